"""Opening a checkpoint or stock GPT-2 weights as a model, and saving it; checkpoint.py reads and checks the files."""

import hashlib
import os

import torch
from transformers.initialization import no_init_weights

from .checkpoint import QuantGPT2Config, open_base, open_checkpoint, saving
from .checkpoint_rules import FLOAT_DTYPES, ROTATION, RULES, is_base
from .errors import UserError
from .exported import take_codes
from .user_input import refuse

# Passed to every class by AutoModel.from_pretrained. No code of a folder is ever run here.
FROM_AUTO_MODEL = ("_from_auto", "adapter_kwargs", "trust_remote_code")


class PretrainedMixin:
    """from_pretrained, save_pretrained and the reference to a frozen base."""

    config_class = QuantGPT2Config

    @classmethod
    def from_pretrained(cls, name_or_path, *, config=None, base_model_name_or_path=None, dtype=None, **kwargs):
        """Load a checkpoint of this class, or stock GPT-2 weights; see checkpoint.py for what is checked.

        name_or_path: folder or hub name; config: as AutoModel passes it, with its overrides; base_model_name_or_path:
        where the frozen base of an adapter checkpoint lies, if not where it was trained; dtype: what the model is cast
        to after it was loaded in float32 (None: float32); kwargs: cache_dir, revision, token for the hub; other
        keys (num_labels, attn_implementation, dropout probabilities) override the config. Raises OSError: nothing
        there; ValueError: other architecture, a faulty config.json, missing, truncated, foreign or non-finite weights,
        a base that the adapters were not trained on.
        """
        name, hub = os.fspath(name_or_path), {key: kwargs.pop(key, None) for key in ("cache_dir", "revision", "token")}
        dtypes = {str(kind).removeprefix("torch."): kind for kind in FLOAT_DTYPES}
        if dtype not in (None, *dtypes, *dtypes.values()):
            raise UserError(f"dtype = {dtype!r}: allowed are {', '.join(dtypes)}")
        for key in FROM_AUTO_MODEL:
            kwargs.pop(key, None)
        attention = {key: kwargs.pop(key) for key in ("attn_implementation",) if key in kwargs}
        if config is not None and config._attn_implementation:
            attention.setdefault("attn_implementation", config._attn_implementation)
        checkpoint = open_checkpoint(name, hub)
        if config is not None:
            saved = QuantGPT2Config(**checkpoint.fields)
            kwargs |= {key: value for key in RULES if (value := getattr(config, key)) != getattr(saved, key)}
        wrong = [key for key, value in kwargs.items() if key not in RULES or not RULES[key][0](value)]
        allowed = {key: RULES[key][1] if key in RULES else "no option" for key in wrong}
        refuse("from_pretrained", [f"{key} = {kwargs[key]!r}: {allowed[key]}" for key in wrong])
        fields, state = checkpoint.fields | kwargs, checkpoint.state
        base_quantization = fields.pop("base_quantization", None)
        if "num_labels" in kwargs:
            fields = {key: value for key, value in fields.items() if key not in ("id2label", "label2id")}
        base = None
        if fields.get("base_model_name_or_path"):
            base = open_base(checkpoint, base_model_name_or_path, hub)
            state = {key: tensor for key, tensor in base.state.items() if is_base(key)} | state
        try:
            with no_init_weights():
                model = cls(QuantGPT2Config(**fields, **attention))
            if fields.get("quantizer") == "rotated":
                model.set_rotations({name: state[name + ROTATION] for name in model.quant_layers()})
        except (ValueError, ImportError) as error:  # bits without an adapter or codes, an attention that is not there
            raise UserError(f"{checkpoint.path}: {error}") from None
        if fields.get("exported_widths"):
            take_codes(model, state)
            model.set_bit_config(fields.get("bit_config"))
        model._load_complete(state, name, checkpoint.own)
        if base and (found := model.base_checksum()) != fields["base_checksum"]:
            raise UserError(
                f"{name}: trained on a base with checksum {fields['base_checksum'][:16]}..., but {base.name} has "
                f"{found[:16]}...; adapters do not fit other weights: say where their base is with "
                "--base_model_name_or_path"
            )
        if base_quantization:
            try:
                model.quantize_base(base_quantization)
            except UserError as error:
                raise UserError(f"{checkpoint.path}: {error}") from None
        model.config._commit_hash = checkpoint.commit
        if dtype:
            model.to(dtypes.get(dtype, dtype))
        model.config.dtype = model.dtype
        return model.eval()

    def _load_complete(self, state, source, own):
        """Take over all weights. Stock weights: other heads are left out, and a head that is not there starts anew."""
        tied = self._tied_weights_keys or {}
        if not own:
            known = set(self.state_dict()) - set(tied)
            state = {name: v for name, v in state.items() if name in known or name.startswith("transformer.")}
        try:
            missing, unexpected = self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise UserError(f"{source}: the weights do not fit its config.json: {error}") from None
        self.tie_weights()
        missing = [name for name in missing if name not in tied]
        if not own:
            for head in {name.rpartition(".")[0] for name in missing if not is_base(name)}:
                self._init_weights(self.get_submodule(head))
            missing = [name for name in missing if is_base(name)]
        for fault, names in (("weights are missing", missing), ("not part of the model", unexpected)):
            if names:
                raise UserError(f"{source}: {fault}: {', '.join(names[:3])} ({len(names)} in all)")

    def set_base(self, name_or_path):
        """Make checkpoints refer to this frozen base (name or path, commit, checksum) instead of containing it.

        Raises ValueError for a model that was cast or quantized: its weights are not those of the base any more.
        """
        if self.config.base_quantization:
            raise UserError(f"set_base comes before quantize_base: the base is {self.config.base_quantization}")
        if self.dtype != torch.float32:
            raise UserError(f"a base of dtype {self.dtype}: adapters are trained on a base in float32")
        is_folder = os.path.isdir(name_or_path)
        self.config.base_model_name_or_path = os.path.abspath(name_or_path) if is_folder else name_or_path
        self.config.base_model_revision = None if is_folder else getattr(self.config, "_commit_hash", None)
        self.config.base_checksum = self.base_checksum()

    def base_checksum(self):
        """sha256 over names and float32 bytes of the base weights (no adapters, no head)."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            if is_base(name):
                digest.update(name.encode())
                digest.update(value.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()

    def save_pretrained(self, save_directory, state_dict=None, **kwargs):
        """Write config and weights; with `set_base` only adapters and head. Every file appears whole or not at all.

        Raises ValueError after `drop_float_weights`, and after `quantize_base` without `set_base`; OSError.
        """
        nf4_of_base = self.config.base_quantization and self.config.base_model_name_or_path
        if not nf4_of_base and any(layer.weight is None for layer in self.quant_layers().values()):
            raise UserError("the float weights were dropped (drop_float_weights): this model has no float checkpoint")
        state_dict = self.state_dict() if state_dict is None else state_dict
        if self.config.base_model_name_or_path:
            state_dict = {name: value for name, value in state_dict.items() if not is_base(name)}
        with saving(save_directory) as folder:
            # one file of weights, whose checksum is in config.json
            super().save_pretrained(folder, state_dict=state_dict, **kwargs | {"max_shard_size": "1TB"})
