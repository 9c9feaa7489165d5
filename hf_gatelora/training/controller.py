"""`GateController`: the handle to the gates of one adapter."""

import logging
import math
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adapters.checkpoint import check_same_run, load_raw, read_state
from ..adapters.export import write_adapter
from ..config import GateConfig
from ..gates import kinds, lora_layers, sharding
from ..gates.blocks import find_towers, gate_costs, group_modules, open_counts
from ..gates.freeze import check_freezable, close_blocks, explain_degenerate, refuse_strict_ddp
from ..gates.optimizers import Optimizers
from ..gates.penalty import STEER_LAMBDA, Penalty

logger = logging.getLogger(__name__)

CONTROLLER = "gate_controller"  # attribute of the PeftModel
GATES = "gates"  # child module of the PeftModel: {adapter name: list of gates}


class GateController:
    """The gates of one adapter: their scores, penalty, schedule, freeze and export. Made by `attach_gates`.

    `step`, `set_scores`, `freeze`, `save_folded` and every save are collective: all ranks call them. Everything else
    may be called by any rank alone.
    """

    def __init__(self, model: PeftModel, layers: dict, config: GateConfig, adapter_name: str):
        self.model, self.config, self.adapter_name = model, config, adapter_name
        self._layers = layers
        multiplications = {name: lora_layers.multiplications(layer, adapter_name) for name, layer in layers.items()}
        self._sizes = {name: adapter for name, (adapter, _) in multiplications.items()}
        self.blocks: dict[str, list[str]] = group_modules(model, list(layers), config)
        self.towers: dict[str, list[int]] = find_towers(self.blocks, config)
        self._counts = open_counts(self.towers, len(self.blocks), config)
        self._penalty = Penalty(config, gate_costs(self.blocks, multiplications, config), self.towers, self._counts)
        self._fingerprint = lora_layers.fingerprint(layers)
        self._base = _describe(model.get_base_model())

        device = lora_layers.lora_parameters(next(iter(layers.values())), adapter_name)[0].device
        gates = nn.ModuleList(kinds.Gate(config, device) for _ in self.blocks)
        for gate, members in zip(gates, self.blocks.values(), strict=True):
            for name in members:
                lora_layers.install(layers[name], adapter_name, gate)
        # The gates hang on the PeftModel, outside PEFT's own layers: PEFT takes everything on those for the adapter.
        model.add_module(GATES, nn.ModuleDict({adapter_name: gates}))
        # Every rank computes these buffers alike. DDP, which broadcasts buffers, fails where the freeze takes the last
        # ones out of a model.
        own = {f"{GATES}.{name}" for name, _ in getattr(model, GATES).named_buffers()}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, own.union(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        )
        setattr(model, CONTROLLER, self)

        self.progress, self.steps, self.total_steps = 0.0, 0, None
        self.penalties = 0  # how many penalties were part of a loss, counted in its backward
        # What the model card says of the run, set by who knows it: its arguments, the last measurement's rows, and the
        # step that the weights are of, where they were loaded from an earlier one.
        self.arguments: dict = {}
        self.results: list[dict] = []
        self.weights_step: int | None = None
        self._open: Tensor | None = None  # boolean mask, once frozen
        self._optimizers = Optimizers(self._block_parameters)

        model.save_pretrained, model.push_to_hub = self.save_pretrained, self.push_to_hub
        self._refresh()

    @property
    def names(self) -> list[str]:
        """One name per gate, in block order."""
        return list(self.blocks)

    @property
    def budget(self) -> list[tuple[list[int], int]]:
        """(indices of its gates, how many stay open) for each part with a budget; empty where the threshold decides."""
        return [] if self._counts is None else list(self._counts)

    # ---- scores -------------------------------------------------------------------------------------------------

    @property
    def _gates(self) -> list[kinds.Gate]:
        return list(getattr(self.model, GATES)[self.adapter_name])

    def score_parameters(self) -> list[nn.Parameter]:
        """The scores' parameters in block order, each fp32 of shape (1,); empty after the freeze."""
        return [] if self.frozen else [gate.score for gate in self._gates]

    def _read_scores(self) -> Tensor:
        """All scores as the forward sees them, fp32 of shape (N,), with gradient. Collective where partitioned."""
        gates = self._gates
        scores = [gate.score for gate in gates]
        if sharding.is_zero3(scores[0]):
            # Read outside a module's forward, a partitioned parameter gets no gradient.
            gathered = [gate(raw=True) for gate in gates] if torch.is_grad_enabled() else sharding.read(scores)
            values = torch.cat(gathered)
        elif sharding.is_fsdp2(scores[0]):
            values = sharding.stack_shards(scores)
        else:
            values = torch.cat(scores)
        values = values.float()
        if gates[0].rounding is torch.float32:
            return values
        return values + (values.to(gates[0].rounding).float() - values).detach()

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the parameters (ZeRO-3, FSDP2)."""
        return any(sharding.is_partitioned(p) for p in self.model.parameters())

    @property
    def frozen(self) -> bool:
        """Whether the gates are 0 or 1 for good."""
        return self._open is not None

    @property
    def scores(self) -> Tensor:
        """Scores as of the last `step`, fp32 of shape (N,), on the CPU; after the freeze those of that moment."""
        return self._scores.cpu().clone()

    @property
    def gates(self) -> Tensor:
        """Gate values (without noise), fp32 of shape (N,), on the CPU; 0 or 1 after the freeze."""
        if self.frozen:
            return self._open.float()
        temperature = kinds.temperature(self.progress, self.config)
        return kinds.gate_values(self.scores, self.config, temperature, None)

    @property
    def open_mask(self) -> Tensor:
        """Boolean mask of the blocks that count as open now, shape (N,), on the CPU."""
        return self._open.clone() if self.frozen else self.scores >= self.config.tau

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
            ValueError: where the number of values is wrong or one is not finite.
        """
        if self.frozen:
            raise RuntimeError("set_scores after the freeze: the gates are 0 or 1 for good.")
        values = torch.as_tensor(values, dtype=torch.float32).flatten()
        if len(values) != len(self.blocks) or not values.isfinite().all():
            raise ValueError(f"set_scores needs {len(self.blocks)} finite values, found {values.tolist()[:4]}...")
        sharding.write(self.score_parameters(), list(values.split(1)))
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
        self.penalties += 1

    def step(self, progress: float) -> None:
        """Move the schedule to `progress`; call it once after every optimizer step.

        Args:
            progress: finished steps / all steps, in [0, 1]. At `freeze_ratio` the gates freeze.

        Raises:
            ValueError: where `progress` is out of [0, 1] or lies before the last one.
            RuntimeError: at the first step already, where DDP does not allow unused parameters.
        """
        if not 0 <= progress <= 1 or progress < self.progress:
            raise ValueError(
                f"progress={progress} must be in [0, 1] and not before the last one, {self.progress}: it is "
                "finished steps / all steps, counted over all epochs."
            )
        if not self.steps and self.config.freeze_ratio < 1:
            refuse_strict_ddp(self.model)  # now, and not when half of the training is spent
        self.progress = progress
        self.steps += 1
        self.weights_step = None
        if self.frozen:
            return
        if progress >= self.config.freeze_ratio:
            if not self.penalties:
                logger.warning(
                    "No loss held the gates' penalty: add gates.penalty() to it, or nothing presses gates to close."
                )
            self._freeze(rewind=self.config.rewind and progress < 1)
        else:
            self._refresh()

    @property
    def lambda_(self) -> float:
        """Penalty weight now, mean over the gates."""
        return self._penalty.lambda_

    @property
    def temperature(self) -> float | None:
        """Temperature of sigmoid gates now; None for the other kinds."""
        return kinds.temperature(self.progress, self.config) if self.config.kind == "sigmoid" else None

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring everything that follows from progress and scores up to date, without a host sync."""
        gates = self._gates
        self._scores = self._read_scores()
        self._penalty.steer(self._scores, self.progress)
        if self.config.kind == "sigmoid":
            value = kinds.temperature(self.progress, self.config)
            values = [torch.full_like(gates[0].temperature, value)] * len(gates)
            torch._foreach_copy_([g.temperature for g in gates], values)
        if self.config.kind == "hard_concrete":
            noise = kinds.step_noise(self.config, self.steps, len(gates)).to(self._scores.device)
            torch._foreach_copy_([g.noise for g in gates], list(noise.split(1)))

    # ---- freeze -------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Make the gates 0 or 1 for good and take the closed blocks out of the model. Idempotent.

        With a budget exactly the budget's number stays open, the best by `criterion`; otherwise the scores >= tau.
        Open blocks become stock PEFT LoRA; closed ones lose their parameters and their optimizer state. With `rewind`
        they start again where `step` freezes them with steps to come, and not here: nothing would be left of them.

        Raises:
            RuntimeError: where a score is not finite, the adapter is merged, or DDP does not allow unused parameters.
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
            mask = kinds.select_open(self._ranking(), list(towers), list(counts))
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
        return torch.tensor(norms, dtype=torch.float64)

    def _close(self, mask: Tensor) -> None:
        self._open = mask.clone()
        removed = [gate.score for gate in self._gates]
        removed += close_blocks(self.model, self.adapter_name, self._layers, self._open_modules)
        delattr(self.model, GATES)
        self._penalty.end()
        self._optimizers.forget(removed)

    @property
    def _open_modules(self) -> list[str]:
        pairs = zip(self._open.tolist(), self.blocks.values(), strict=True)
        return [name for is_open, members in pairs if is_open for name in members]

    @property
    def degenerate(self) -> str | None:
        """What is wrong with a result in which every gate ended the same way; None where it is not so."""
        return explain_degenerate(self._open) if self.frozen else None

    def fold(self) -> PeftModel:
        """Freeze, and turn the model in place into a plain PEFT LoRA with the open blocks; returns the model.

        Raises:
            RuntimeError: under DeepSpeed ZeRO and FSDP, whose engines hold on to the model as it is.
        """
        if getattr(self.model, CONTROLLER, None) is not self:
            return self.model  # folded before
        if any(sharding.is_partitioned(p) or sharding.is_zero(p) for p in self.model.parameters()):
            raise RuntimeError(
                "Cannot fold a model that DeepSpeed or FSDP manages. Write it with save_folded(directory), and load "
                "that with PeftModel.from_pretrained(base_model, directory)."
            )
        self.freeze()
        if not self._open.any():
            lora_layers.uninstall(self._layers[next(iter(self._layers))], self.adapter_name)
        del self.model.save_pretrained, self.model.push_to_hub
        delattr(self.model, CONTROLLER)
        return self.model

    # ---- saving -------------------------------------------------------------------------------------------------

    def save_folded(self, directory) -> None:
        """Write a stock PEFT adapter that gives the gated model's outputs; the model stays as it is.

        After the freeze it holds only the open blocks. `gates.json` and `gatelora_state.safetensors` lie beside it.
        """
        if not self.frozen:
            logger.warning(
                f"The gates are not frozen yet: this adapter holds all {len(self.blocks)} blocks (step was called "
                f"{self.steps} times, up to progress {self.progress:g}; they freeze at {self.config.freeze_ratio:g})."
            )
        weights = self.whole_adapters() if self.sharded else None
        if PartialState().is_main_process:
            self._write(directory, state_dict=weights)
        PartialState().wait_for_everyone()

    def whole_adapters(self) -> dict[str, Tensor]:
        """Weights of all adapters by their name in the model, gathered from all processes. Collective."""
        weights = {n: t for n, t in self.model.state_dict(keep_vars=True).items() if lora_layers.is_adapter_key(n)}
        return dict(zip(weights, sharding.read(list(weights.values())), strict=True))

    def save_pretrained(
        self,
        save_directory,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        **kwargs,
    ) -> None:
        """`PeftModel.save_pretrained` of the gated model: the gated adapter is written folded, the others as always.

        The folded adapter's files lie in `save_directory` itself, unless the adapter named "default" is also saved.
        """
        selected = list(self.model.peft_config) if selected_adapters is None else list(selected_adapters)
        kwargs["safe_serialization"] = safe_serialization
        if kwargs.get("state_dict") is None and self.sharded:
            kwargs["state_dict"] = self.whole_adapters()
        others = [name for name in selected if name != self.adapter_name]
        if others:
            PeftModel.save_pretrained(
                self.model, save_directory, selected_adapters=others, is_main_process=is_main_process, **kwargs
            )
        if self.adapter_name in selected and is_main_process:
            self._write(Path(save_directory) / (self.adapter_name if "default" in others else ""), **kwargs)

    def _write(self, directory, **kwargs) -> None:
        values = self.gates.tolist()
        factors = {m: v for members, v in zip(self.blocks.values(), values, strict=True) for m in members}
        weights_step = self.steps if self.weights_step is None else self.weights_step
        run = {"base_model": self._base, "arguments": self.arguments, "weights_step": weights_step}
        write_adapter(
            self.model,
            self.adapter_name,
            factors,
            self.state_dict(),
            {**self.summary(), **run},
            directory,
            results=self.results,
            **kwargs,
        )
        from ..card.write import refresh_card  # late: training needs no cards until it saves

        refresh_card(directory)

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = None, **kwargs) -> str | None:
        """`PeftModel.push_to_hub` of the gated model: its folder as `save_pretrained` writes it, with our model card.

        Collective, as a save is; the main process pushes.

        Args:
            kwargs: private, revision, token and create_pr, as for `hub.push.push_adapter`.

        Returns:
            The URL of the repository; None on the other processes.
        """
        from ..card.push import PushError, push_adapter

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, selected_adapters=[self.adapter_name])
            if not PartialState().is_main_process:
                return None
            try:
                return push_adapter(folder, repo_id, commit_message=commit_message, **kwargs)
            except PushError as error:
                raise PushError(
                    error.reason,
                    "Call push_to_hub again, or save_pretrained(FOLDER) and push that later: gatelora push FOLDER "
                    f"{repo_id}",
                ) from error

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
        """Make an optimizer known, so that the freeze drops closed blocks from it; its first step does so as well."""
        self._optimizers.watch(optimizer)

    def _block_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        if self.frozen:
            return [], []
        layers = self._layers.values()
        return self.score_parameters(), [
            p for layer in layers for p in lora_layers.lora_parameters(layer, self.adapter_name)
        ]

    # ---- state and summary --------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What resuming needs besides the model's weights."""
        return {
            "scores": self.scores,
            "open": self._open.clone() if self.frozen else torch.zeros(0, dtype=torch.bool),
            "progress": torch.tensor(self.progress, dtype=torch.float64),
            "steps": torch.tensor(self.steps),
            "total_steps": torch.tensor(self.total_steps or 0),
        }

    def load_state_dict(self, state: dict, write_scores: bool = True) -> None:
        """Take over a state; a frozen one freezes this model to the same open blocks.

        Args:
            write_scores: False where an engine has loaded the scores' parameters, more exact than the state has them.
        """
        self.progress, self.steps = float(state["progress"]), int(state["steps"])
        self.total_steps = int(state["total_steps"]) or None
        if len(state["open"]):
            self._scores = state["scores"].to(self._scores.device)
            self._close(state["open"].bool())
        elif write_scores:
            self.set_scores(state["scores"])
        else:
            self._refresh()

    def check_resumable(self, directory) -> None:
        """Check that a checkpoint was written by a run with the same base model, blocks and gate configuration.

        Raises:
            ValueError: naming what differs.
        """
        check_same_run(directory, self.summary())

    def restore(self, directory, by_engine: bool = False) -> None:
        """Take over the gates of a checkpoint that `check_resumable` accepted and whose weights are loaded.

        Args:
            by_engine: whether DeepSpeed or FSDP loaded them, as trained; otherwise they came from the folded adapter.
        """
        state, raw, _ = read_state(directory)
        if not by_engine:
            load_raw(self.model, raw)
        self.load_state_dict(state, write_scores=not by_engine)

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
        scores, values, is_open = self.scores.tolist(), self.gates.tolist(), self.open_mask.tolist()
        sizes = [sum(self._sizes[m] for m in members) for members in self.blocks.values()]
        return {
            "adapter_name": self.adapter_name,
            "base_fingerprint": self._fingerprint,
            "lora": {k: getattr(lora, k) for k in ("r", "lora_alpha", "lora_dropout", "use_rslora")},
            "config": self.config.to_dict(),
            "phase": kinds.phase(self.progress, self.frozen, self.config),
            "progress": self.progress,
            "steps": self.steps,
            "total_steps": self.total_steps,
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


def _describe(base: nn.Module) -> dict:
    """Class of the base model, and names of the classes that its head tells apart, for the model card."""
    described = {"class": type(base).__name__, "library": type(base).__module__.split(".")[0]}
    if described["class"].endswith(("ForImageClassification", "ForSequenceClassification")):
        names = getattr(getattr(base, "config", None), "id2label", None) or {}
        described["classes"] = [str(name) for _, name in sorted(names.items())]
    return described
