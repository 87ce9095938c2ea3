"""Which bit-width configs a model with a bank is trained for, and which of them a step takes.

In reading order: the flags, the configs that they name, the configs of an optimizer step.
"""

import dataclasses
import os
import random

from common import arguments
from common.arguments import option
from common.flags import check_file_name
from models.bit_config import config_name, describe_bit_config, has_kv, resolve_bit_config, short_name
from models.errors import UserError


@dataclasses.dataclass
class BankArguments(arguments.ModelArguments):
    """A model with an adapter for every width."""

    bit_widths: list[int] = option([4, 8], "widths to serve, W = A = KV; each has its own adapter in every linear")
    bit_configs: list[str] | None = option(
        None,
        'train and evaluate these configs instead: JSON files (configs/README.md), "W4A8KV8", or widths as 8; '
        "adapters for their w_bits",
    )


def check_bank(model_args):
    """Refuse widths and configs that cannot stand side by side, before anything is loaded."""
    named_configs(model_args.bit_configs or [])
    if len(set(model_args.bit_widths)) < len(model_args.bit_widths):
        raise UserError(f"--bit_widths {' '.join(map(str, model_args.bit_widths))}: every width once")


def named_configs(sources):
    """{name: source} of --bit_configs; refuses two whose names agree or whose predictions would go to one file."""
    named, files = {}, {}
    for source in sources:
        named[config_name(source)] = source
        for kind in ("", "_nbest"):
            file = f"eval_{config_name(source)}{kind}_predictions.json"
            check_file_name("--bit_configs writes", f"{file}.{os.getpid()}.tmp")
            if (key := file.casefold()) in files:
                raise UserError(
                    f"--bit_configs {files[key]} {source}: two configs are called {config_name(source)}, or both "
                    f"would write {file}; results could not tell them apart"
                )
            files[key] = source
    return named


def assignment(layers, widths):
    """(name, resolved config) with W = A = KV = the layer's own width."""
    config = {layer: {"w_bits": width, "a_bits": width} for layer, width in zip(layers, widths, strict=True)}
    for layer in filter(has_kv, config):
        config[layer]["kv_bits"] = config[layer]["w_bits"]
    return short_name(config), config


def uniform_configs(layers, bit_widths):
    """[(name, resolved config)] of every width, highest first."""
    return [assignment(layers, [width] * len(layers)) for width in sorted(bit_widths, reverse=True)]


def target_configs(model_args, shapes):
    """[(name, resolved config)] to train and evaluate, highest precision first.

    The name is that of the JSON file, or W8A8KV8. `shapes`: {layer: (out, in)}.
    """
    if not model_args.bit_configs:
        return uniform_configs(shapes, model_args.bit_widths)
    named = named_configs(model_args.bit_configs)
    targets = {name: resolve_bit_config(source, shapes) for name, source in named.items()}

    def average_bits(pair):
        weights = describe_bit_config(pair[1], shapes)["average_w_bits"]
        return weights, sum(bits["a_bits"] for bits in pair[1].values())

    return sorted(targets.items(), key=average_bits, reverse=True)


def note_targets(model, targets):
    """Have the checkpoint name what it is trained at: what is evaluated and served where nothing else is asked for."""
    names = dict.fromkeys(short_name(config) for _, config in targets)
    model.config.trained_bit_configs = [name for name in names if name != "mixed"] or ["checkpoint"]


def joined(step, number, curriculum, total_steps):
    """How many of `number` configs take part in `step` of a curriculum: the highest at once, the others one by one."""
    return min(1 + int(step * (number - 1) / (curriculum * total_steps) + 1e-9), number)


def bit_configs_for_step(
    step, seed, layers, bit_widths, num_mixed_configs=1, *, objective="joint", total_steps=None, curriculum=0.0,
    sample_widths=0, explicit=None, teacher=False,
):  # fmt: skip
    """The configs that optimizer step `step` trains, in the order of their passes.

    A function of its arguments alone: all processes draw the same, and so does a resumed run.
    joint: the highest width; `num_mixed_configs` random per-layer assignments and `sample_widths` random widths from
    between, by average weight bits; the lowest width. random: one draw, with even odds a uniform width or (unless
    `num_mixed_configs` is 0) a per-layer assignment. sequential: one width after the other, each for an equal share
    of `total_steps`.

    Args:
        layers: {name: (out, in)}, as `model.layer_shapes()`.
        bit_widths: the widths to choose from; curriculum: lower ones join evenly over this fraction of `total_steps`.
        explicit: [(name, resolved config)], highest first: takes the place of the uniform and the mixed configs.
        teacher: a full-precision pass comes first.
    Returns:
        [(name, resolved config), ...], highest precision first.
    """
    rng = random.Random(f"{seed}-{step}")
    targets = explicit or uniform_configs(layers, bit_widths)
    if objective == "sequential":
        return [targets[min(step * len(targets) // total_steps, len(targets) - 1)]]
    if curriculum > 0:
        targets = targets[: joined(step, len(targets), curriculum, total_steps)]
    widths = sorted(bit_widths, reverse=True)[: len(targets)]

    def mixed():
        return "mixed", assignment(layers, [rng.choice(widths) for _ in layers])[1]

    if objective == "random":
        use_mixed = not explicit and len(widths) > 1 and num_mixed_configs > 0 and rng.random() < 0.5
        passes = [mixed() if use_mixed else rng.choice(targets)]
    elif explicit or len(targets) == 1:
        passes = targets
    else:
        between = rng.sample(targets[1:-1], min(sample_widths, len(targets) - 2))
        between += [mixed() for _ in range(num_mixed_configs)]
        between.sort(key=lambda pair: -describe_bit_config(pair[1], layers)["average_w_bits"])
        passes = [targets[0], *between, targets[-1]]
    return uniform_configs(layers, [32]) * teacher + passes
