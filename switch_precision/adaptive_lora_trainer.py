"""Switchable-precision training: one batch, several bit-width configs, one optimizer step.

In reading order: the flags, the losses of distillation, the trainer. A new objective is a name in `OBJECTIVES`, the
configs of its steps in common/step_configs.py, and, where its passes are not those of `joint_losses`, a method here.
Sources: InstantNet (arXiv 2104.10853) Eq. 1 for cascade distillation; the published code of this system (QaLoF) for
`sequential`; universally slimmable networks (arXiv 1903.05134) for the sandwich, highest and lowest in every step.
"""

import dataclasses

import torch
import torch.nn.functional as F

from common.arguments import option
from common.step_configs import bit_configs_for_step, joined
from models.errors import UserError
from trainer_qa import QuestionAnsweringTrainer, qa_cross_entropy

OBJECTIVES = ("joint", "random", "sequential")
DISTILLATIONS = ("kl", "mse", "none")


@dataclasses.dataclass
class ObjectiveArguments:
    """What a training step does. Highest precision always goes first."""

    objective: str = option(
        "joint",
        "joint: highest width, mixed configs, lowest width in every step; random: one random config a step; "
        "sequential: one width after the other, --max_steps / widths each (as published)",
    )
    num_mixed_configs: int = option(1, "random per-layer assignments a step; 0 for uniform widths only")
    sample_widths: int = option(0, "random widths a step between the highest and the lowest, as passes of their own")
    curriculum: float = option(
        0.0,
        "lower widths join one after the other over this fraction of the steps, each with a copy of the next higher "
        "width's adapter",
    )
    teacher: bool = option(False, "a full-precision pass with its own adapter goes first and teaches the others")
    distill_loss: str = option("kl", "distillation from the higher passes: kl, mse (raw logits, InstantNet) or none")
    distill_weight: float | None = option(
        None,
        "weight of each higher pass beside cross-entropy (default 0.25); sequential: w gives (CE + w KL) / (1 + w) "
        "(default 1, as published)",
    )
    distill_temperature: float = option(2.0, "temperature of --distill_loss kl, whose gradient scale is kept by T^2")

    def __post_init__(self):
        if self.distill_weight is None:
            self.distill_weight = 1.0 if self.objective == "sequential" else 0.25

    def check(self, bit_widths):
        """Refuse what cannot work. `bit_widths`: the widths that steps choose from, None for --bit_configs."""
        for flag, allowed in {"objective": OBJECTIVES, "distill_loss": DISTILLATIONS}.items():
            if getattr(self, flag) not in allowed:
                raise UserError(f"--{flag} {getattr(self, flag)}: allowed are {', '.join(allowed)}")
        for flag in ("num_mixed_configs", "sample_widths", "distill_weight"):
            if getattr(self, flag) < 0:
                raise UserError(f"--{flag} {getattr(self, flag)}: must not be negative")
        if not 0 <= self.curriculum <= 1:
            raise UserError(f"--curriculum {self.curriculum}: a fraction of the steps, 0 to 1")
        if self.distill_temperature <= 0:
            raise UserError(f"--distill_temperature {self.distill_temperature}: must be positive")
        if self.sample_widths and (self.objective != "joint" or not bit_widths):
            what = "adds widths to a joint step of --bit_widths"
            raise UserError(f"--sample_widths {what}: no other objective or configs")
        if self.sample_widths > (between := max(len(bit_widths or ()) - 2, 0)):
            found = f"--bit_widths has {between} widths between the highest and the lowest"
            raise UserError(f"--sample_widths {self.sample_widths}: {found}")
        if self.objective == "sequential" and (self.teacher or self.curriculum):
            raise UserError("--objective sequential has its own teachers and order: no --teacher, no --curriculum")
        if self.teacher and 32 in (bit_widths or ()):
            raise UserError("--teacher is the width 32, which --bit_widths has already")


# ---- losses


def qa_distillation_kl(student_start, student_end, teacher_start, teacher_end, mask, temperature=2.0):
    """T^2 * KL(teacher || student) at temperature T, mean of start and end and over the batch.

    Logits (batch, seq); mask (batch, seq), true on tokens: padding is left out of both distributions.
    """

    def log_probabilities(logits):
        return F.log_softmax((logits.float() / temperature).masked_fill(~mask, torch.finfo(torch.float32).min), -1)

    pairs = ((student_start, teacher_start), (student_end, teacher_end))
    return temperature**2 * 0.5 * sum(
        F.kl_div(log_probabilities(student), log_probabilities(teacher), reduction="batchmean", log_target=True)
        for student, teacher in pairs
    )  # fmt: skip


def qa_distillation_mse(student_start, student_end, teacher_start, teacher_end, mask):
    """Squared difference of the raw logits, mean over the tokens of a window, the batch, and start and end."""

    def mse(student, teacher):
        squares = (student.float() - teacher.float()).square().masked_fill(~mask, 0.0)
        return (squares.sum(-1) / mask.sum(-1)).mean()

    return 0.5 * (mse(student_start, teacher_start) + mse(student_end, teacher_end))


# ---- trainer


class AdaptiveLoRATrainer(QuestionAnsweringTrainer):
    """Trains and evaluates several bit-width configs of one model.

    Args:
        configs: [(name, resolved config)], highest first: those evaluated, and the phases of `sequential`.
        bit_widths: the widths that steps choose from; None where steps take `configs` as they are.
        objective: what a step does, an `ObjectiveArguments`.
    """

    def __init__(self, *args, configs, bit_widths, objective, **kwargs):
        super().__init__(*args, configs=configs, **kwargs)
        self.bit_widths, self.objective = bit_widths, objective
        self.layers = self.model.layer_shapes()
        self._logged = {}  # {config name: [(loss x share, share) of every pass since the last log]}

    def step_configs(self, step):
        """[(name, resolved config)] of the passes of an optimizer step."""
        names = ("num_mixed_configs", "objective", "curriculum", "sample_widths", "teacher")
        options = {name: getattr(self.objective, name) for name in names}
        options |= {"total_steps": self.state.max_steps, "explicit": None if self.bit_widths else self.configs}
        return bit_configs_for_step(step, self.args.seed, self.layers, self.bit_widths or (), **options)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """All passes of one micro-batch, each sent backward at once: the memory is that of one pass.

        DDP's reducer is left out (it was not made for adapters that some steps do not use): the passes run on the
        bare model and the gradients are averaged once per optimizer step.
        """
        net = self.accelerator.unwrap_model(model)
        net.train()
        inputs = self._prepare_inputs(inputs)
        share = inputs.pop("share", 1.0)
        configs = self.step_configs(self.state.global_step)
        self._copy_adapters_of_joining_configs(net)
        step = self.sequential_losses if self.objective.objective == "sequential" else self.joint_losses
        losses, scale = step(net, inputs, configs, share)
        finite = torch.isfinite(torch.stack(losses)).all()  # one wait for the device, not one a pass
        for (name, config), loss in zip(configs, losses, strict=True):
            if not finite:
                net.set_bit_config(config)  # named in the message
                self.stop_unless_finite(loss)
            self._logged.setdefault(name, []).append(torch.stack([loss * share, torch.as_tensor(share).to(loss)]))
        net.set_bit_config(self.configs[0][1])  # what is saved opens at the highest precision
        if self.accelerator.sync_gradients and self.args.world_size > 1:
            self._average_gradients(net)
        return torch.stack(losses).sum() * (scale * share)

    def _copy_adapters_of_joining_configs(self, net):
        """A config that joins a curriculum goes on from what the next higher one has learned."""
        step, curriculum, bank = self.state.global_step, self.objective.curriculum, net.config.lora_bank
        if not (curriculum and step) or bank == ["shared"]:
            return
        rest = len(self.configs), curriculum, self.state.max_steps
        for number in range(joined(step - 1, *rest), joined(step, *rest)):
            for name, layer in net.quant_layers().items():
                used = [config[name]["w_bits"] for _, config in self.configs[:number]]
                if (width := self.configs[number][1][name]["w_bits"]) not in used:
                    layer.copy_adapter(str(used[-1]), str(width))

    def joint_losses(self, net, inputs, configs, share):
        """Send the mean over the passes of L_i = CE(z_i) + weight * sum_j distance(z_i, z_j) backward, j over all
        passes before i, which get no gradient from it.

        InstantNet's Eq. 1 averages the L_i over the passes, as here; its released code adds them up.
        Returns: ([L_i], what they are multiplied by).
        """
        losses, logits, scale = [], [], 1 / len(configs)
        for _, config in configs:
            logits.append(self._logits(net, inputs, config))
            losses.append(self._loss_of_pass(logits[-1], logits[:-1], inputs, self.objective.distill_weight))
            self.accelerator.backward(losses[-1] * (scale * share))  # checkpointing recomputes with these bits
            losses[-1], logits[-1] = losses[-1].detach(), logits[-1].detach()
        return losses, scale

    def sequential_losses(self, net, inputs, configs, share):
        """The published procedure: one config, which learns below 8 bits from the higher ones by an extra forward
        without gradient (and, unlike there, without dropout): L = (CE + weight * mean KL) / (1 + weight), which for
        weight 1 is the published (1 - a) CE + a KL with a = 0.5.

        Returns: ([CE + weight * mean KL], what it is multiplied by).
        """
        ((name, config),) = configs
        weight, scale, teachers = 0.0, 1.0, []
        if names := self.teacher_names(name):
            net.eval()
            with torch.no_grad():
                teachers = [self._logits(net, inputs, dict(self.configs)[teacher]) for teacher in names]
            net.train()
            weight, scale = self.objective.distill_weight / len(teachers), 1 / (1 + self.objective.distill_weight)
        loss = self._loss_of_pass(self._logits(net, inputs, config), teachers, inputs, weight)
        self.accelerator.backward(loss * (scale * share))
        return [loss.detach()], scale

    def _logits(self, net, inputs, config):
        """Start and end logits (2, batch, seq) under a config."""
        net.set_bit_config(config)
        with self.compute_loss_context_manager():
            output = net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return torch.stack([output.start_logits, output.end_logits])

    def _loss_of_pass(self, logits, teachers, inputs, weight):
        """Cross-entropy + weight * sum of the distances to the teachers' logits."""
        mask = inputs["attention_mask"].bool()
        loss = qa_cross_entropy(logits, torch.stack([inputs["start_positions"], inputs["end_positions"]]), mask)
        if self.objective.distill_loss == "none":
            return loss
        return loss + weight * sum(self._distance(logits, teacher, mask) for teacher in teachers)

    def _distance(self, student, teacher, mask):
        if self.objective.distill_loss == "mse":
            return qa_distillation_mse(*student, *teacher, mask)
        return qa_distillation_kl(*student, *teacher, mask, self.objective.distill_temperature)

    def teacher_names(self, name):
        """Configs whose extra forward teaches config `name`: in `sequential`, below 8 bits, all higher ones."""
        if self.objective.objective != "sequential" or self.objective.distill_loss == "none":
            return []
        names = list(dict(self.configs))
        below_8 = any(bits["w_bits"] < 8 for bits in dict(self.configs)[name].values())
        return names[: names.index(name)] if below_8 else []

    def forward_passes(self):
        """Forward passes of one process in the whole training, those of teachers included."""
        steps = map(self.step_configs, range(self.state.global_step))
        passes = sum(len(configs) + len(self.teacher_names(configs[0][0])) for configs in steps)
        return passes * self.args.gradient_accumulation_steps

    def _average_gradients(self, net):
        """Mean over the processes in one collective. Which gradients exist follows from the configs: same on all."""
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def log(self, logs, start_time=None):
        """Adds the loss of each config, mean since the last log, over all processes."""
        if "loss" in logs and self._logged:
            sums = torch.stack([torch.stack(losses).sum(0) for losses in self._logged.values()])
            sums = self.accelerator.reduce(sums, "mean")
            means = (sums[:, 0] / sums[:, 1]).tolist()
            logs |= {f"loss_{name}": mean for name, mean in zip(self._logged, means, strict=True)}
            self._logged = {}
        super().log(logs, start_time)
