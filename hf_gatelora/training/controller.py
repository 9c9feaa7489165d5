"""`GateController`: the handle to the gates of one adapter."""

import logging
import math
import uuid
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import GateConfig
from ..gates import engines, lora_layers
from ..gates.blocks import find_towers, gate_costs, group_modules, open_counts, select_open
from ..gates.freeze import (
    check_freezable,
    close_blocks,
    explain_degenerate,
    explain_short_search,
    explain_ties,
    refuse_strict_ddp,
)
from ..gates.kinds import Gate, kind_of
from ..gates.optimizers import Optimizers
from ..gates.penalty import STEER_LAMBDA, Penalty
from ..gates.schedule import phase
from ..gates.state import GateState, open_mask_of
from . import saving

logger = logging.getLogger(__name__)

CONTROLLER = "gate_controller"  # attribute of the PeftModel
GATES = "gates"  # child module of the PeftModel: {adapter name: list of gates}


class GateController:
    """The gates of one adapter: their scores, penalty, schedule and freeze. Made by `attach_gates`.

    `step`, `set_scores`, `freeze`, `save_folded` and every save are collective: all ranks call them. Everything else
    may be called by any rank alone.

    Attributes:
        model: the `PeftModel`.
        config: the gates' settings.
        adapter_name: the adapter that is gated.
        blocks: LoRA module names by gate name, in block order.
        towers: gate indices by tower.
    """

    def __init__(self, model: PeftModel, layers: dict, config: GateConfig, adapter_name: str):
        self.model, self.config, self.adapter_name = model, config, adapter_name
        self._layers = layers
        multiplications = {name: lora_layers.multiplications(layer, adapter_name) for name, layer in layers.items()}
        self._sizes = {name: adapter for name, (adapter, _) in multiplications.items()}
        self.blocks: dict[str, list[str]] = group_modules(model, list(layers), config)
        self.towers: dict[str, list[int]] = find_towers(self.blocks, config)
        self._counts = open_counts(self.towers, len(self.blocks), config)
        self._kind = kind_of(config)
        costs = gate_costs(self.blocks, multiplications, config)
        self._penalty = Penalty(self._kind, costs, self.towers, self._counts)
        self._fingerprint = lora_layers.fingerprint(layers)

        device = lora_layers.lora_parameters(next(iter(layers.values())), adapter_name)[0].device
        gates = [Gate(self._kind, device) for _ in self.blocks]
        for gate, members in zip(gates, self.blocks.values(), strict=True):
            for name in members:
                lora_layers.install(layers[name], adapter_name, gate)
        # The gates hang on the PeftModel, outside PEFT's own layers: PEFT takes everything on those for the adapter.
        model.add_module(GATES, nn.ModuleDict({adapter_name: nn.ModuleList(gates)}))
        # Every rank computes these buffers alike. DDP, which broadcasts buffers, fails if the freeze removes a model's
        # last ones.
        own = {f"{GATES}.{name}" for name, _ in getattr(model, GATES).named_buffers()}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, own.union(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        )
        setattr(model, CONTROLLER, self)

        self._state = GateState()
        self.penalty_count = 0  # how many penalties were part of a loss, counted in its backward
        self._optimizers = Optimizers(self._block_parameters)

        vars(model).update(
            save_pretrained=partial(saving.save_pretrained, self), push_to_hub=partial(saving.push_to_hub, self)
        )
        self._refresh()

    @property
    def names(self) -> list[str]:
        """One name per gate, in block order."""
        return list(self.blocks)

    @property
    def budget(self) -> list[tuple[list[int], int]]:
        """(gate indices, how many of them stay open) for each part with a budget; empty if the threshold decides."""
        return [] if self._counts is None else list(self._counts)

    # ---- scores -------------------------------------------------------------------------------------------------

    @property
    def _gate_modules(self) -> list[Gate]:
        return list(getattr(self.model, GATES)[self.adapter_name])

    def score_parameters(self) -> list[nn.Parameter]:
        """The scores' parameters in block order, each fp32 of shape (1,); empty after the freeze."""
        return [] if self.frozen else [gate.score for gate in self._gate_modules]

    def _read_scores(self) -> Tensor:
        """All scores as the forward sees them, fp32 of shape (N,), with gradient. Collective if partitioned."""
        gates = self._gate_modules
        values = engines.engine_of(gates[0].score).scores(gates).float()
        if gates[0].rounding is torch.float32:
            return values
        return values + (values.to(gates[0].rounding).float() - values).detach()

    @property
    def frozen(self) -> bool:
        """Whether the gates are 0 or 1 for good."""
        return self._state.open is not None

    @property
    def scores(self) -> Tensor:
        """Scores as of the last `step`, fp32 of shape (N,), on the CPU; after the freeze those of that moment."""
        return self._scores.cpu().clone()

    @property
    def gates(self) -> Tensor:
        """Gate values (without noise), fp32 of shape (N,), on the CPU; 0 or 1 after the freeze."""
        if self._state.open is not None:
            return self._state.open.float()
        scores, state = self.scores, None
        if not self._kind.stochastic:
            state = self._kind.state(self.progress, self.steps, len(scores), scores.device)
        return self._kind.value(scores, state)

    @property
    def open_mask(self) -> Tensor:
        """Boolean mask of the blocks that count as open now, shape (N,), on the CPU."""
        return self.scores >= self.config.tau if self._state.open is None else self._state.open.clone()

    @property
    def active_fraction(self) -> float:
        """Open blocks / all blocks."""
        return self.open_mask.float().mean().item()

    @torch.no_grad()
    def set_scores(self, values) -> None:
        """Overwrite all scores.

        Args:
            values: N finite numbers, in block order.

        Raises:
            RuntimeError: after the freeze.
            ValueError: if the number of values is wrong or one is not finite.
        """
        if self.frozen:
            raise RuntimeError("set_scores after the freeze: the gates are 0 or 1 for good.")
        values = torch.as_tensor(values, dtype=torch.float32).flatten()
        if len(values) != len(self.blocks) or not values.isfinite().all():
            raise ValueError(f"set_scores needs {len(self.blocks)} finite values, found {values.tolist()[:4]}...")
        engines.write(self.score_parameters(), list(values.split(1)))
        self._refresh()

    # ---- penalty and schedule -----------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """lambda(t) * sum_i c_i |s_i| / sum_i c_i as a scalar with gradient to the scores; 0 after the freeze.

        Its gradient per score is lambda c_i / sum c, whatever the number of micro-batches and ranks. For hard
        concrete gates the probability of a non-zero gate takes the place of |s_i|.
        """
        if self.frozen:
            return torch.zeros((), device=self._scores.device)
        penalty = self._penalty(self._read_scores())
        if penalty.requires_grad:
            penalty.register_hook(self._count_penalty)
        return penalty

    def _count_penalty(self, gradient: Tensor) -> None:
        self.penalty_count += 1

    def start(self, total_steps: int, arguments: dict) -> None:
        """Note what run this is, at its start or as it goes on.

        Args:
            total_steps: of the run.
            arguments: of the run, for the model card.

        Raises:
            ValueError: if the run was started with another number of steps.
        """
        if self.steps and self._state.total_steps not in (None, total_steps):
            raise ValueError(
                f"This run was started with max_steps={self._state.total_steps} and is resumed with {total_steps}: the "
                "gates' schedule would not be the same. Resume with the same number of steps (epochs, batch size, "
                "accumulation), or start a new run."
            )
        self._state.total_steps, self._state.arguments = total_steps, arguments
        self._state.run = self._state.run or uuid.uuid4().hex

    def start_over(self) -> None:
        """Go back to before the first step, scores included, as a Trainer does that tries a smaller batch.

        Raises:
            RuntimeError: after the freeze.
        """
        if self.frozen:
            raise RuntimeError(
                "Memory ran out after the gates froze, and closed blocks cannot come back. Start the run again with a "
                "smaller per_device_train_batch_size."
            )
        self._state = GateState(run=self._state.run)
        self.set_scores([self.config.init] * len(self.blocks))

    def step(self, progress: float) -> None:
        """Move the schedule to `progress`; call it once after every optimizer step.

        Args:
            progress: finished steps / all steps, in [0, 1]. At `freeze_ratio` the gates freeze.

        Raises:
            ValueError: if `progress` is out of [0, 1] or lies before the last one.
            RuntimeError: if DDP does not allow unused parameters, already at the first step.
        """
        if not 0 <= progress <= 1 or progress < self.progress:
            raise ValueError(
                f"progress={progress} must be in [0, 1] and not before the last one, {self.progress}: it is "
                "finished steps / all steps, counted over all epochs."
            )
        if not self.steps and self.config.freeze_ratio < 1:
            refuse_strict_ddp(self.model)  # now, and not when half of the training is spent
        self._state.progress, self._state.steps, self._state.weights_step = progress, self.steps + 1, None
        if self.frozen:
            return
        if progress >= self.config.freeze_ratio:
            if not self.penalty_count:
                logger.warning(
                    "No loss contained the gates' penalty: add gates.penalty() to it, or nothing presses gates to "
                    "close."
                )
            self._freeze(rewind=self.config.rewind and progress < 1)
        else:
            self._refresh()

    @property
    def progress(self) -> float:
        """Where the schedule is, in [0, 1], as of the last `step`."""
        return self._state.progress

    @property
    def steps(self) -> int:
        """How often `step` was called, in this run and those that it resumes."""
        return self._state.steps

    @property
    def lambda_(self) -> float:
        """Penalty weight now, mean over the gates."""
        return self._penalty.lambda_

    @property
    def temperature(self) -> float | None:
        """Temperature of sigmoid gates now; None for kinds without one."""
        return self._kind.temperature(self.progress)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring everything that follows from progress and scores up to date, without a host sync."""
        gates = self._gate_modules
        self._scores = self._read_scores()
        self._penalty.steer(self._scores, self.progress)
        state = self._kind.state(self.progress, self.steps, len(gates), self._scores.device)
        if state is not None:
            torch._foreach_copy_([gate.state for gate in gates if gate.state is not None], list(state.split(1)))

    # ---- freeze -------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Make the gates 0 or 1 for good and take the closed blocks out of the model. Idempotent.

        With a budget exactly the budget's number stays open, the best by `criterion`; otherwise the scores >= tau.
        Open blocks become stock PEFT LoRA; closed ones lose their parameters and their optimizer state. With `rewind`
        open blocks restart only if `step` freezes with steps to come; here their training would be lost.

        Raises:
            RuntimeError: if a score is not finite, the adapter is merged, or DDP does not allow unused parameters.
        """
        self._freeze(rewind=False)

    @torch.no_grad()
    def _freeze(self, rewind: bool) -> None:
        if self.frozen:
            return
        check_freezable(self.model, self._layers)
        self._scores = self._read_scores()
        if not self._scores.isfinite().all():
            bad = [n for n, s in zip(self.names, self.scores, strict=True) if not math.isfinite(s)]
            raise RuntimeError(
                f"Cannot freeze: {len(bad)} scores are not finite (first: {bad[0]}). Lower learning_rate."
            )
        if self._counts is None:
            mask = self.scores >= self.config.tau
        else:
            towers, counts = zip(*self._counts, strict=True)
            mask = select_open(self._ranking(), list(towers), list(counts))
        self._close(mask)
        if rewind:
            for name in self._open_modules:  # as LoRA starts: B = 0; A stays as it is
                lora_layers.reset(self._layers[name], self.adapter_name)
            self._optimizers.restart()
        if self.degenerate:
            logger.warning(self.degenerate)

    def _ranking(self) -> Tensor:
        if self.config.criterion == "score":
            return self.scores
        norms = [
            math.sqrt(sum(lora_layers.update_norm(self._layers[m], self.adapter_name) for m in members))
            for members in self.blocks.values()
        ]
        if not all(map(math.isfinite, norms)):
            raise RuntimeError("Cannot freeze: weights of LoRA blocks are not finite. Lower the learning rate.")
        return torch.tensor(norms, dtype=torch.float64)

    def _close(self, mask: Tensor) -> None:
        self._state.open = mask.clone()
        removed: list[nn.Parameter] = [gate.score for gate in self._gate_modules]
        removed += close_blocks(self.model, self.adapter_name, self._layers, self._open_modules)
        delattr(self.model, GATES)
        self._penalty.end()
        self._optimizers.forget(removed)

    @property
    def _open_modules(self) -> list[str]:
        pairs = zip(self.open_mask.tolist(), self.blocks.values(), strict=True)
        return [name for is_open, members in pairs if is_open for name in members]

    @property
    def degenerate(self) -> str | None:
        """What is wrong with the result, if all gates ended the same way or could not learn; else None."""
        if self._state.open is None:
            return None
        found = [explain_degenerate(self._state.open)]
        if self.config.criterion == "score":
            found.append(explain_ties(self.scores, self.budget))
        if self.config.criterion == "score" or self._counts is None:
            found.append(explain_short_search(self.config, self._state.total_steps))
        return " ".join(filter(None, found)) or None

    def fold(self) -> PeftModel:
        """Freeze, and turn the model in place into a plain PEFT LoRA with the open blocks; returns the model.

        Raises:
            RuntimeError: under DeepSpeed ZeRO and FSDP, whose engines keep references to the model as it is.
        """
        if getattr(self.model, CONTROLLER, None) is not self:
            return self.model  # folded before
        if any(engines.engine_of(p).manages for p in self.model.parameters()):
            raise RuntimeError(
                "Cannot fold a model that DeepSpeed or FSDP manages. Write it with save_folded(directory), and load "
                "that with PeftModel.from_pretrained(base_model, directory)."
            )
        self.freeze()
        if not self.open_mask.any():
            lora_layers.uninstall(self._layers[next(iter(self._layers))], self.adapter_name)
        del self.model.save_pretrained, self.model.push_to_hub
        delattr(self.model, CONTROLLER)
        return self.model

    def save_folded(self, directory) -> None:
        """Write a stock PEFT adapter that gives the gated model's outputs; the model stays as it is.

        After the freeze it holds only the open blocks. `gates.json` and `gatelora_state.safetensors` lie beside it.
        """
        saving.save_folded(self, directory)

    # ---- optimizer ----------------------------------------------------------------------------------------------

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict]:
        """Optimizer groups: LoRA weights and heads with `lr` and `weight_decay`; scores with their own, undecayed.

        A learning-rate schedule multiplies both rates, and gradient clipping counts the scores in.
        """
        scores = self.score_parameters()
        own = {id(p) for p in scores}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return [{"params": others, "lr": lr, "weight_decay": weight_decay}, self.score_group()]

    def score_group(self) -> dict:
        """Optimizer group of the scores alone.

        Adam's epsilon is a tenth of the penalty's gradient per gate. With the usual 1e-8 Adam would blow every
        gradient up to a full step, also one that is nothing beside the penalty, and such noise would decide which
        blocks open. Optimizers without an epsilon ignore the entry; transformers' Adafactor wants a pair in its place.
        """
        epsilon = 0.1 * (self.config.lambda_ or STEER_LAMBDA) / len(self.blocks)
        rate = self.config.learning_rate
        return {"params": self.score_parameters(), "lr": rate, "weight_decay": 0.0, "eps": epsilon}

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Register an optimizer, so that the freeze drops closed blocks from it; its first step does so as well."""
        self._optimizers.watch(optimizer)

    def _block_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        if self.frozen:
            return [], []
        layers = self._layers.values()
        weights = [p for layer in layers for p in lora_layers.lora_parameters(layer, self.adapter_name)]
        return self.score_parameters(), weights

    # ---- state and summary --------------------------------------------------------------------------------------

    def record(self, rows: list[dict]) -> None:
        """Hand over the rows of the last measurement, which saves carry along for the model card."""
        self._state.results = rows

    def weights_are_of(self, step: int) -> None:
        """Note that the model's weights were loaded from an earlier step; the next `step` clears it."""
        self._state.weights_step = step

    @property
    def weights_step(self) -> int:
        """The optimizer step that the model's weights are of."""
        return self.steps if self._state.weights_step is None else self._state.weights_step

    @property
    def run(self) -> str | None:
        """What identifies the run, through resuming; None before it starts."""
        return self._state.run

    @property
    def results(self) -> list[dict]:
        """The rows of the last measurement."""
        return self._state.results

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs besides the model's weights."""
        return self._state.tensors(self.scores)

    def load_state_dict(self, state: dict[str, Tensor], write_scores: bool = True, run: str | None = None) -> None:
        """Take over a state; a frozen one freezes this model to the same open blocks.

        Args:
            write_scores: False if an engine has loaded the scores' parameters, more exact than the state has them.
            run: what identifies the run that the state is of.
        """
        self._state.resume(state)
        self._state.run = run
        if self.frozen:
            return
        mask = open_mask_of(state)
        if mask is not None:
            self._scores = state["scores"].to(self._scores.device)
            self._close(mask)
        elif write_scores:
            self.set_scores(state["scores"])
        else:
            self._refresh()

    def tower_counts(self) -> dict[str, dict[str, int]]:
        """Gates and open gates of each tower."""
        is_open = self.open_mask.tolist()
        return {
            tower: {"gates": len(members), "open": sum(is_open[i] for i in members)}
            for tower, members in self.towers.items()
        }

    def summary(self) -> dict:
        """The gates as plain JSON types: configuration, schedule, towers, and one row per gate."""
        lora = self.model.peft_config[self.adapter_name]
        # JSON has no NaN.
        scores = [score if math.isfinite(score) else None for score in self.scores.tolist()]
        values = [value if math.isfinite(value) else None for value in self.gates.tolist()]
        is_open = self.open_mask.tolist()
        sizes = [sum(self._sizes[m] for m in members) for members in self.blocks.values()]
        return {
            "adapter_name": self.adapter_name,
            "base_fingerprint": self._fingerprint,
            "lora": {k: getattr(lora, k) for k in ("r", "lora_alpha", "lora_dropout", "use_rslora")},
            "config": self.config.to_dict(),
            "phase": phase(self.progress, self.frozen, self.config),
            "progress": self.progress,
            "steps": self.steps,
            "total_steps": self._state.total_steps,
            "lambda": self.lambda_,
            "temperature": self.temperature,
            "gates": len(is_open),
            "open": sum(is_open),
            "active_fraction": self.active_fraction,
            "towers": self.tower_counts(),
            "lora_parameters": sum(sizes),
            "open_parameters": sum(size for size, o in zip(sizes, is_open, strict=True) if o),
            "degenerate": self.degenerate,
            "blocks": [
                {"name": name, "modules": members, "score": score, "gate": value, "open": o, "parameters": size}
                for (name, members), score, value, o, size in zip(
                    self.blocks.items(), scores, values, is_open, sizes, strict=True
                )
            ],
        }

    def description(self) -> dict:
        """The contents of `gates.json`: the summary, and what the model card says of base model and run."""
        return {
            **self.summary(),
            "base_model": saving.describe_base(self.model),
            "run": self._state.run,
            "arguments": self._state.arguments,
            "weights_step": self.weights_step,
        }
