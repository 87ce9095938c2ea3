"""Switchable-precision training: one batch, several bit-width configs, one optimizer step.

In reading order: the configs of a step (`bit_configs_for_step`), losses (cross-entropy, distillation), the trainer.
Sources: InstantNet (arXiv 2104.10853) Eq. 1 for cascade distillation; the published code of this system (QaLoF) for
`sequential`; universally slimmable networks (arXiv 1903.05134) for the sandwich, highest and lowest in every step.
"""

import torch
import torch.nn.functional as F

from trainer_qa import QuestionAnsweringTrainer, qa_cross_entropy

# ---- losses


def qa_distillation_kl(student_start, student_end, teacher_start, teacher_end, mask, temperature=2.0):
    """T^2 * KL(teacher || student) at temperature T, mean of start and end and over the batch.

    Args: logits (batch, seq), mask (batch, seq) true on tokens: padding is left out of both distributions.
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


def cascade_losses(passes, cross_entropy, distance=None, weight=1.0, teachers=()):
    """Yield L_i = CE(z_i) + weight * sum_j distance(z_i, stop-gradient z_j), j over all passes before i.

    InstantNet's Eq. 1 averages the L_i over the passes, its released code adds them up: that factor is the caller's.

    Args:
        passes: iterable of logits z_i, highest precision first. It may be a generator that runs the model: pass i is
            yielded, and may be sent backward, before z_{i+1} is asked for.
        cross_entropy: z -> loss; distance: (student, teacher) -> loss, None for no distillation.
        teachers: detached logits that teach from the first pass on.
    """
    teachers = list(teachers)
    for logits in passes:
        yield cross_entropy(logits) + weight * sum(distance(logits, teacher) for teacher in teachers if distance)
        teachers.append(logits.detach())


# ---- trainer


class AdaptiveLoRATrainer(QuestionAnsweringTrainer):
    """Trains and evaluates several bit-width configs of one model.

    Args:
        configs: [(name, resolved config)], highest first: those evaluated, and the phases of `sequential`.
        sampler: (step, total_steps=...) -> passes of that step; `bit_configs_for_step` with its settings bound.
        sequential: the published procedure. A config below 8 bits learns from the higher ones by an extra forward
            without gradient (and, unlike there, without dropout): L = (CE + weight * mean KL) / (1 + weight), which
            for weight 1 is the published (1 - a) CE + a KL with a = 0.5.
        distance: (student start, end, teacher start, end, mask) -> loss; None for no distillation.
    """

    def __init__(self, *args, configs, sampler, sequential=False, distance=None, distill_weight=1.0, **kwargs):
        super().__init__(*args, configs=configs, **kwargs)
        self.sampler, self.sequential = sampler, sequential
        self.distance, self.distill_weight = distance, distill_weight
        self._logged = {}  # {config name: [(loss x share, share) of every pass since the last log]}

    def training_step(self, model, inputs, num_items_in_batch=None):
        """All passes of one micro-batch, each sent backward at once: the memory is that of one pass.

        The loss is the mean over the passes. DDP's reducer is left out (it was not made for adapters that some steps
        do not use): the passes run on the bare model and the gradients are averaged once per optimizer step.
        """
        net = self.accelerator.unwrap_model(model)
        net.train()
        inputs = self._prepare_inputs(inputs)
        share = inputs.pop("share", 1.0)
        positions = torch.stack([inputs.pop("start_positions"), inputs.pop("end_positions")])
        mask = inputs["attention_mask"].bool()
        configs = self.sampler(self.state.global_step, total_steps=self.state.max_steps)

        def forward(config):
            net.set_bit_config(config)
            with self.compute_loss_context_manager():
                output = net(**inputs)
            return torch.stack([output.start_logits, output.end_logits])  # (2, batch, seq)

        weight, scale, teachers = self.distill_weight, 1 / len(configs), []
        if names := self.teacher_names(configs[0][0]):
            net.eval()
            with torch.no_grad():
                teachers = [forward(dict(self.configs)[name]) for name in names]
            net.train()
            weight, scale = self.distill_weight / len(teachers), 1 / (1 + self.distill_weight)

        losses = []
        for loss in cascade_losses(
            (forward(config) for _, config in configs),
            lambda logits: qa_cross_entropy(logits, positions, mask),
            self.distance and (lambda student, teacher: self.distance(*student, *teacher, mask)),
            weight,
            teachers,
        ):
            scaled = loss * (scale * share)
            self.accelerator.backward(scaled)  # before the next forward: checkpointing recomputes with these bits
            losses.append(scaled.detach())
        finite = torch.isfinite(torch.stack(losses)).all()  # one wait for the device, not one a pass
        for (name, config), loss in zip(configs, losses, strict=True):
            if not finite:
                net.set_bit_config(config)  # named in the message
                self.stop_unless_finite(loss)
            self._logged.setdefault(name, []).append(torch.stack([loss / scale, torch.as_tensor(share).to(loss)]))
        net.set_bit_config(self.configs[0][1])  # what is saved opens at the highest precision
        if self.accelerator.sync_gradients and self.args.world_size > 1:
            self._average_gradients(net)
        return torch.stack(losses).sum()

    def teacher_names(self, name):
        """Configs whose extra forward teaches config `name`: in `sequential`, below 8 bits, all higher ones."""
        if not self.sequential or self.distance is None:
            return []
        names = list(dict(self.configs))
        below_8 = any(bits["w_bits"] < 8 for bits in dict(self.configs)[name].values())
        return names[: names.index(name)] if below_8 else []

    def forward_passes(self):
        """Forward passes of one process in the whole training, those of teachers included."""
        steps = (self.sampler(step, total_steps=self.state.max_steps) for step in range(self.state.global_step))
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
