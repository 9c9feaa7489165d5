"""What `benchmark.py` compares: one model with its optimizer for each way of training it, and of running it."""

import copy
import random
import time
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPForImageClassification, Dinov2Config, Dinov2ForImageClassification

from hf_gatelora import GateConfig, attach_gates, lora_targets

CLASSES = 100
# Width, layers, heads, patch size. CLIP is its vision tower with a head.
MODELS = {
    "clip-b16": (768, 12, 12, 16),
    "clip-l14": (1024, 24, 16, 14),
    "dinov2-s": (384, 12, 6, 14),
    "dinov2-b": (768, 12, 12, 14),
    "dinov2-l": (1024, 24, 16, 14),
}
PLACES = ("random", "late", "early")
# What a model is that only runs: the base, adapters beside it, an adapter merged into it.
INFERENCE = ("base", "lora, unmerged", "folded, unmerged", "folded, merged")


@dataclass
class BenchmarkArguments:
    """What is measured, and how often."""

    model: str = field(default="dinov2-s", metadata={"help": ", ".join(MODELS)})
    layers: int = field(default=None, metadata={"help": "another number of layers than the model's"})
    image_size: int = field(default=224, metadata={"help": "pixels"})
    batch_size: int = field(default=8, metadata={"help": "images per step"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    open_fractions: list[float] = field(
        default_factory=lambda: [0.05, 0.25, 0.5], metadata={"help": "of blocks, of the frozen models"}
    )
    dtype: str = field(default="fp32", metadata={"help": "fp32, or autocast to bf16 or fp16"})
    device: str = field(default=None, metadata={"help": "default: cuda where there is one, else cpu"})
    threads: int = field(default=1, metadata={"help": "of torch, on a CPU"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the models"})
    repeats: int = field(default=9, metadata={"help": "turns that every case takes"})
    only: list[str] = field(default_factory=list, metadata={"help": "some of the cases alone, and lora"})
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "where the results go"})
    report: bool = field(default=False, metadata={"help": "run nothing: table and plot of results.jsonl"})

    def __post_init__(self):
        if self.model not in MODELS or self.dtype not in ("fp32", "bf16", "fp16"):
            raise ValueError(
                f"--model {self.model} --dtype {self.dtype}: give one of {', '.join(MODELS)}, and of fp32, bf16, fp16."
            )
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.cases()

    def cases(self) -> list[str]:
        """Names of the training cases.

        Raises:
            ValueError: where `only` names none of them.
        """
        names = ["frozen forward", "full", "lora", "search", "soft search"]
        names += [f"frozen@{fraction:g} {place}" for fraction in self.open_fractions for place in PLACES]
        if unknown := [name for name in self.only if name not in names]:
            raise ValueError(f"--only {unknown[0]!r} is no case: give some of {', '.join(names)}.")
        return [name for name in names if not self.only or name in (*self.only, "lora")]


def new_base(arguments: BenchmarkArguments) -> nn.Module:
    """The base model, with a head; the same weights at each call."""
    width, layers, heads, patch = MODELS[arguments.model]
    shape = {"hidden_size": width, "num_hidden_layers": arguments.layers or layers, "num_attention_heads": heads}
    shape |= {"image_size": arguments.image_size, "patch_size": patch}
    torch.manual_seed(0)
    if torch.device(arguments.device).index is not None:
        torch.accelerator.set_device_index(torch.device(arguments.device).index)  # whose time and memory are measured
    if arguments.model.startswith("dinov2"):
        model = Dinov2ForImageClassification(Dinov2Config(**shape, num_labels=CLASSES))
    else:
        config = CLIPConfig(vision_config={**shape, "intermediate_size": 4 * width}, num_labels=CLASSES)
        model = CLIPForImageClassification(config)
    return model.to(arguments.device)


class Case:
    """A model with its optimizer, as one way of training has it.

    Args:
        base: its weights are shared where they are frozen.
    """

    def __init__(self, name: str, arguments: BenchmarkArguments, base: nn.Module):
        self.arguments, self.gates = arguments, None
        shared = {} if name in ("full", "folded, merged") else {id(p): nn.Parameter(p.data) for p in base.parameters()}
        # The memo leaves out what is shared; a copy that is dropped again would be this process's peak of memory.
        self.model = copy.deepcopy(base, shared)
        if name not in ("full", "frozen forward", "base"):
            self._adapt(name)
        self.trains = name not in ("frozen forward", *INFERENCE)
        # Fused, as Trainer's default is.
        if self.gates and not self.gates.frozen:
            self.optimizer = torch.optim.AdamW(self.gates.param_groups(lr=1e-5), fused=True)
            self._scores_optimizer = torch.optim.AdamW([self.gates.score_group()], fused=True)
        elif self.trains:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.model.train(self.trains)
        self._call = torch.compile(self.model) if arguments.compile else self.model
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(arguments.batch_size, 3, *[arguments.image_size] * 2, generator=generator)
        labels = torch.randint(CLASSES, (arguments.batch_size,), generator=generator)
        self._batch = {"pixel_values": pixels.to(arguments.device), "labels": labels.to(arguments.device)}

    def _adapt(self, name: str) -> None:
        rank, targets = self.arguments.lora_r, lora_targets(self.model)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=["classifier"])
        self.model = get_peft_model(self.model, config)
        if name.startswith("lora"):
            return
        kind = "sigmoid" if name == "soft search" else "straight_through"
        # Without a budget the scores say which blocks are open after the freeze.
        self.gates = attach_gates(self.model, GateConfig(kind=kind, target_active=None, lambda_=1e-6))
        if "search" in name:
            return
        fraction, place = 0.05, "random"
        if name.startswith("frozen@"):
            first, place = name.removeprefix("frozen@").split()
            fraction = float(first)
        blocks = len(self.gates.names)
        count = max(1, round(fraction * blocks))
        order = list(range(blocks))
        # Of random draws that whose earliest block, which decides how far backward goes, is in the middle of theirs.
        draws = sorted(sorted(random.Random(seed).sample(order, count)) for seed in range(99))
        chosen = {"random": draws[49], "early": order[:count], "late": order[-count:]}
        self.gates.set_scores([float(i in chosen[place]) for i in order])
        started = now(self.arguments)
        if name.startswith("folded"):
            self.model = self.gates.fold()
        else:
            self.gates.freeze()
        self.fold_seconds = now(self.arguments) - started
        if name.endswith(" merged"):
            self.model = self.model.merge_and_unload()

    def _forward(self) -> torch.Tensor:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.arguments.dtype)
        with torch.autocast(torch.device(self.arguments.device).type, dtype, enabled=dtype is not None):
            return self._call(**self._batch).loss

    def step(self) -> None:
        """A training step; a forward alone, without gradient, where nothing trains."""
        if not self.trains:
            with torch.no_grad():
                self._forward()
            return
        loss = self._forward()
        if self.gates:
            loss = loss + self.gates.penalty()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.gates:
            self.gates.step(self.gates.progress)

    def machinery(self) -> None:
        """What a searching step does for the gates' sake, without the model: values, penalty, update and schedule."""
        values = torch.cat([gate(noisy=True) * 1.0 for gate in self.model.get_submodule("gates.default")])
        (values.sum() + self.gates.penalty()).backward()
        self._scores_optimizer.step()
        self._scores_optimizer.zero_grad()
        self.gates.step(self.gates.progress)

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        tensors = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def now(arguments: BenchmarkArguments) -> float:
    """Seconds: of the processor on a CPU, of the clock where a GPU works."""
    if arguments.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
