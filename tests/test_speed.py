"""What makes gates cheap, held without a clock: by counting operations, saved tensors, graphs and host syncs."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from backbones import BACKBONES
from conftest import make_trainer
from models import FAMILIES, lora_config, outputs_of, randomize
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback
from world import ROOT

from hf_gatelora import GateConfig, GatedLoraTrainer, attach_gates
from hf_gatelora.config import KINDS
from hf_gatelora.evaluation.results import read_results

# isort: split
import benchmark
import scaling
from benchmark_cases import INFERENCE, BenchmarkArguments, Case
from benchmark_plots import growth

aten = torch.ops.aten
MATMULS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.convolution}
FIRST, LAST = 0, -1  # blocks of the DINOv2: the query of the first layer, the fc2 of the last one


class Operations(TorchDispatchMode):
    """The operations run within it, those of a backward included, as (name, shape of the first result)."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        first = result[0] if isinstance(result, (tuple, list)) and len(result) else result
        self.seen[operation.overloadpacket, getattr(first, "shape", None)] += 1
        return result

    @property
    def matmuls(self) -> int:
        return sum(count for (operation, _), count in self.seen.items() if operation in MATMULS)


def adapted(family, **config):
    base = family["model"]()
    model = get_peft_model(base, lora_config(base, **config))
    randomize(model)
    return model


def gated(family, **config):
    model = adapted(family)
    return model, attach_gates(model, GateConfig(**{"target_active": None, "lambda_": 0.5} | config))


def frozen(family, *blocks):
    """A model that is frozen with these blocks open, by their numbers."""
    model, gates = gated(family)
    scores = torch.zeros(len(gates.names))
    scores[list(blocks)] = 1.0
    gates.set_scores(scores)
    gates.freeze()
    assert gates.open_mask.sum() == len(blocks)
    return model, gates


def loss_of(family, model):
    return model.train()(**family["inputs"]())[family["output"]].square().mean()


def forward_and_backward(family, model) -> tuple[Operations, Operations]:
    with Operations() as forward:
        loss = loss_of(family, model)
    with Operations() as backward:
        loss.backward()
    return forward, backward


def test_a_searching_step_runs_no_more_than_stock_lora(family):
    """As many matmuls, and no output-wide operation for scaling and adding: one product does both."""
    (model, gates), stock = gated(family), adapted(family)
    ours, theirs = forward_and_backward(family, model), forward_and_backward(family, stock)
    for own, reference in zip(ours, theirs):
        assert own.matmuls == reference.matmuls
    blocks = len(gates.names)
    assert sum(n for (operation, _), n in ours[0].seen.items() if operation is aten.addmm_) == blocks

    def wide(operations):
        names = (aten.add, aten.mul)
        seen = operations.seen.items()
        return sum(n for (operation, shape), n in seen if operation in names and shape and shape[-1] >= 16)

    assert wide(ours[0]) == wide(theirs[0]) - 2 * blocks
    assert wide(ours[1]) == wide(theirs[1]) - blocks


def test_a_closed_block_runs_no_matmul_and_saves_nothing_for_backward(family):
    model, gates = frozen(family, FIRST, LAST)
    with Operations() as base:
        loss_of(family, family["model"]())
    saved, inside = [], []

    def enter(module, inputs):
        inside.append(len(saved))

    def leave(module, inputs, output):
        own = {parameter.data_ptr() for parameter in module.parameters()}
        assert {tensor.data_ptr() for tensor in saved[inside.pop() :]} <= own, "a closed block saved an activation"
        closed.append(module)

    closed = []
    modules = dict(model.named_modules())
    for name, is_open in zip(gates.names, gates.open_mask):
        if not is_open:
            module = modules[f"base_model.model.{name}"]
            assert type(module) is torch.nn.Linear, "the LoRA layer around it is gone"
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with Operations() as ours, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = loss_of(family, model)
    assert ours.matmuls == base.matmuls + 2 * 2
    assert len(closed) == len(gates.names) - 2
    assert saved
    loss.backward()


def test_after_the_freeze_only_open_blocks_have_gradients_and_optimizer_state(family):
    model, gates = gated(family, target_active=0.2)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    everything = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for progress in (0.2, 0.6):
        (loss_of(family, model) + gates.penalty()).backward()
        optimizer.step()
        assert {id(p) for p in optimizer.state} == everything
        gates.step(progress)
    left = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(left) == 2 * gates.open_mask.sum() < len(everything) / 3
    assert {id(p) for p in optimizer.state} == left
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left


def test_backward_ends_at_the_earliest_open_block():
    family = FAMILIES["dinov2"]
    products, entered, saved = {}, {}, {}
    for block in (FIRST, LAST):
        model, _ = frozen(family, block)
        entered[block], kept = [], []
        for name, layer in model.named_modules():
            if name.rpartition(".")[0].endswith("encoder.layer"):
                layer.register_forward_hook(lambda _, i, out, seen=entered[block]: seen.append(out.requires_grad))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = loss_of(family, model)
        with Operations() as backward:
            loss.backward()
        products[block], saved[block] = backward.matmuls, sum(kept)
    assert entered == {FIRST: [True, True], LAST: [False, True]}
    # Through the head; through the six layers of the second block, and the three after attention of the first; and
    # for the adapter's B, A x and A.
    assert products[LAST] == 1 + 3
    assert products[FIRST] == 1 + 6 + 3 + 3
    assert saved[LAST] < saved[FIRST] / 3


def test_the_compute_cost_of_a_block_is_what_a_step_pays_for_opening_it(family):
    """Against the products of a real step, up to attention and to what lies side by side: q, k and v."""

    def products(model):
        with FlopCounterMode(display=False) as counter:
            loss = loss_of(family, model)
            if loss.requires_grad:
                loss.backward()
        return counter.get_total_flops()

    _, gates = gated(family, cost="compute")
    gates.step(0.3)
    gates.penalty().backward()
    costs = [parameter.grad.item() for parameter in gates.score_parameters()]
    base = products(family["model"]().requires_grad_(False))
    paid = [products(frozen(family, block)[0]) - base for block in range(len(costs))]
    assert max(paid) > 4 * min(paid)
    ratios = [own / cost for own, cost in zip(paid, costs)]
    assert max(ratios) < 1.6 * min(ratios)


def test_of_equally_useful_blocks_the_cheaper_opens(family):
    """No block is of any use here: only the penalty moves the scores, with the optimizer that users have."""
    _, gates = gated(family, cost="compute", target_active=0.25, lambda_=None)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    for step in range(20):
        gates.penalty().backward()
        if step == 10:
            cost = torch.cat([parameter.grad for parameter in gates.score_parameters()])
        optimizer.step()
        optimizer.zero_grad()
        gates.step((step + 1) / 20 * 0.45)
    gates.freeze()
    count = int(gates.open_mask.sum())
    assert cost[gates.open_mask].max() <= cost.sort().values[count - 1]
    assert cost.max() > 3 * cost.min()


@pytest.mark.parametrize("kind", KINDS)
def test_a_searching_step_does_not_wait_for_the_device(family, kind):
    """Meta tensors have no values: on them, whatever reads one on the host fails."""
    model, gates = gated(family, kind=kind, target_active=0.5, lambda_=None)
    model.to("meta")
    # Of a mask transformers reads whether it masks anything.
    inputs = {key: value.to("meta") for key, value in family["inputs"]().items() if key != "attention_mask"}
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    for progress in (0.1, 0.2, 0.3):
        loss = model.train()(**inputs)[family["output"]].square().mean() + gates.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step(progress)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        gates.active_fraction  # noqa: B018 - this reads


@pytest.mark.parametrize("nan_filter", [True, False])
def test_trainers_steps_read_what_stock_trainer_reads(tmp_path, nan_filter):
    """With Trainer's NaN filter, which reads the loss on the host at every step, we read it once more."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += operation.overloadpacket is aten._local_scalar_dense
            return operation(*args, **kwargs or {})

    class Noting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            noted[state.global_step] = reads.count

    family, reads, found = FAMILIES["dinov2"], Reads(), []
    settings = {"gate_freeze_ratio": 0.9, "logging_strategy": "no", "logging_nan_inf_filter": nan_filter}

    def stock(model, args, peft_config, **kwargs):
        return Trainer(model, args, **kwargs)

    for trainer_class in (GatedLoraTrainer, stock):
        reads.count, noted = 0, {}
        settings |= {"model": adapted(family), "callbacks": [Noting()]}
        trainer = make_trainer(family, tmp_path, trainer_class=trainer_class, **settings)
        with reads:
            trainer.train()
        found.append(noted[12] - noted[2])
    assert found[0] - found[1] == (10 if nan_filter else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_the_search_and_one_after_the_freeze(kind):
    """Neither lambda nor temperature, noise or gates make the compiled training forward anew."""
    backbone = BACKBONES["DINOv2"]
    base = backbone["model"]()
    model = get_peft_model(base, lora_config(base))
    randomize(model)
    gates = attach_gates(model, GateConfig(kind=kind, target_active=0.5))
    torch._dynamo.reset()
    counters.clear()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-3))
    for step in range(6):
        loss = loss_of(backbone, compiled)
        assert loss.item() == pytest.approx(loss_of(backbone, model).item(), rel=1e-5)
        (loss + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step(step / 10)
        assert graphs.frame_count == 1
    assert gates.frozen
    for _ in range(2):
        loss = loss_of(backbone, compiled)
        loss.backward()
        assert graphs.frame_count == 2
    assert loss.item() == pytest.approx(loss_of(backbone, model).item(), rel=1e-5)
    assert not counters["graph_break"]


def two_adapters(model):
    torch.manual_seed(0)
    model.add_adapter("other", lora_config(model.get_base_model()))
    randomize(model)
    model.base_model.set_adapter(["default", "other"])


def checkpointed(model):
    model.activation_checkpointing_enable({"use_reentrant": False})


def bf16_base(model):
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "score" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def bf16(model):
    model.to(torch.bfloat16)


# What is done to the model, with autocast or without, and how near to stock LoRA its gradients come.
WAYS = {
    "two adapters": (two_adapters, False, 1e-6),
    "gradient checkpointing": (checkpointed, False, 1e-6),
    "autocast": (lambda model: None, True, 3e-2),
    "bf16 base": (bf16_base, False, 3e-2),
    "bf16": (bf16, False, 3e-2),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_fast_path_has_the_gradients_of_stock_lora(way):
    prepare, autocast, tolerance = WAYS[way]
    family, found = FAMILIES["dinov2"], []
    for model in (gated(family)[0], adapted(family)):
        prepare(model)
        inputs = family["inputs"]()["pixel_values"].to(model.get_base_model().dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(inputs).logits.float().square().mean()
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        limit = tolerance * max(1.0, expected.abs().max().item())
        assert (found[0][name] - expected).abs().max() <= limit, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_can_be_differentiated_again(kind):
    """As optimizers that use curvature and penalties on gradients do; against the operations one by one."""
    found = []
    for plain in (False, True):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]))
        randomize(model)
        gates = attach_gates(model, GateConfig(kind=kind, target_active=None, lambda_=0.5))
        if plain:  # B is called, and so is everything else
            for name, module in model.named_modules():
                if name.endswith("lora_B.default"):
                    module.register_forward_hook(lambda *_: None)
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = model.train()(torch.randn(5, 6)).square().sum()
        slopes = torch.autograd.grad(loss, trained, create_graph=True)
        squares = sum(slope.square().sum() for slope in slopes)
        found.append(torch.autograd.grad(squares, trained))
        assert len(trained) == 4 + len(gates.names)
    for own, expected in zip(*found):
        assert expected.abs().max() > 0
        assert (own - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


def small(**config):
    """Two adapted linear layers."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 32))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], **config))
    randomize(model)
    return model


def selectively_checkpointed(model, x):
    products = [aten.mm.default, aten.addmm.default]
    context = partial(create_selective_checkpoint_contexts, products)
    result = checkpoint(model, x.requires_grad_(), use_reentrant=False, context_fn=context)
    result.square().sum().backward()
    return [result, x.grad]


def under_global_hooks(model, x):
    """What the base layers returned, and the gradients of it."""
    seen, layers = [], [module for name, module in model.named_modules() if name.endswith("base_layer")]

    def keep(module, inputs, output):
        if module in layers:
            seen.append(output)

    def note(module, of_inputs, of_outputs):
        if module in layers:
            seen.append(of_outputs[0])

    handles = [register_module_forward_hook(keep)]
    try:
        model(x)
        handles.append(register_module_full_backward_hook(note))
        model(x.requires_grad_()).square().sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def forward_mode(model, x):
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))))


def per_sample_gradients(model, x):
    weights = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}

    def loss(weights, row):
        return torch.func.functional_call(model, weights, (row,)).square().sum()

    return list(torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x).values())


def jagged(model, x):
    rows = torch.nested.nested_tensor([x[:1, 0], x[1:, 0]], layout=torch.jagged)
    return [model(rows).values()]


def sparse(model, x):
    return [model(x[:, 0].to_sparse())]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of a gate's forward, which has no inputs
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own forward mode
@pytest.mark.parametrize(
    "way", [selectively_checkpointed, under_global_hooks, forward_mode, per_sample_gradients, jagged, sparse]
)
def test_what_takes_stock_lora_takes_gates(way):
    """Whoever keeps, follows or transforms operations finds each of them by itself, and nothing written over."""
    model = small()
    attach_gates(model, GateConfig(target_active=None, lambda_=0.5))
    x = torch.randn(4, 3, 64)
    found = [way(model, x.clone()) for model in (model, small())]
    assert len(found[0]) == len(found[1]) > 0
    for own, expected in zip(*found):
        assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", ["lora_", "lora_B"])
def test_backward_is_held_what_stock_lora_holds(trained):
    """A frozen A (LoRA-FA) has no use for its input; gates add no more than numbers."""

    def held(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name or "score" in name)
        own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(torch.randn(16, 64))
        return sum(storage.nbytes() for storage in kept.values())

    model, stock = small(), small()
    attach_gates(model, GateConfig(target_active=None, lambda_=0.5))
    rank_wide = 2 * 16 * 2 * 4  # the intermediates of both layers
    assert held(model) <= held(stock) + rank_wide + 64


def test_what_others_look_at_is_not_overwritten(family):
    """A hook on the base layer sees, and may keep, what that returned; a hook on B is called."""
    model, gates = gated(family)
    expected = outputs_of(family, model)
    name = gates.names[LAST]
    layer = model.get_submodule(f"base_model.model.{name}")
    kept, copies, called = [], [], []

    def keep(module, inputs, output):
        kept.append(output)
        copies.append(output.detach().clone())

    handles = [layer.base_layer.register_forward_hook(keep)]
    handles += [layer.lora_B["default"].register_forward_hook(lambda *_: called.append(True))]
    assert torch.allclose(outputs_of(family, model), expected, atol=1e-6)
    assert torch.equal(kept[0], copies[0])
    assert called
    for handle in handles:
        handle.remove()
    layer.base_layer.register_full_backward_hook(lambda *_: called.append(True))
    called.clear()
    loss_of(family, model).backward()
    assert called


# ---- the benchmark
def test_benchmark(tmp_path, monkeypatch, capsys):
    """Every case once, on one layer; the ratios are those of the rows' own seconds, the files what was trained."""
    arguments = ["--layers", "1", "--image_size", "28", "--batch_size", "1", "--repeats", "1", "--lora_r", "2"]
    arguments += ["--open_fractions", "0.5", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(benchmark, "memory", lambda names, arguments: [])  # starts a process for each case
    benchmark.main(arguments)
    rows = read_results(tmp_path / "results.jsonl")
    found = {(row["method"], row["metric"]): row["value"] for row in rows}
    frozen = [f"frozen@0.5 {place}" for place in ("random", "late", "early")]
    trained = ["full", "lora", "search", "soft search", *frozen]
    assert {method for method, metric in found if metric == "step_ratio"} == {"frozen forward", *trained}
    assert {method for method, metric in found if metric == "forward_ratio"} == set(INFERENCE)
    for method in trained:
        ratio = found[method, "step_seconds"] / found["lora", "step_seconds"]
        assert found[method, "step_ratio"] == pytest.approx(ratio)
    # AdamW holds two numbers per parameter; a folded adapter holds the open blocks and the head, and nothing else.
    head = 4 * (2 * 384 * 100 + 100)
    for method in ("lora", "search", *frozen):
        size = found[method, "trained_bytes"]
        gates = found["search", "blocks"] * 4 if method == "search" else 0
        assert found[method, "adapter_bytes"] <= 1.02 * (size - gates) + found[method, "header_bytes"]
        assert 0 <= found[method, "optimizer_bytes"] - 2 * size <= 4 * 20
    assert found["frozen@0.5 random", "trained_bytes"] < found["lora", "trained_bytes"]
    assert found["frozen@0.5 late", "trained_bytes"] == head + 4 * 2 * (2 * 384 + 2 * (384 + 1536))
    table = (tmp_path / "benchmark.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"| {method} " in table for method in (*trained, *INFERENCE))
    assert matplotlib.image.imread(tmp_path / "step_time.png").std() > 0.02
    # Where the time goes: what the profiler saw is no more than there was, and most of it.
    for method in ("lora", "search", "frozen@0.5 random"):
        spent = [found[method, f"time of {part}"] for part in benchmark.PARTS]
        assert min(spent) >= 0
        assert spent[list(benchmark.PARTS).index("matrix products")] > 0


def test_the_benchmark_refuses_unknown_cases():
    with pytest.raises(ValueError, match="'lor' is no case: give some of frozen forward, full, lora, search"):
        BenchmarkArguments(only=["search", "lor"])


def test_the_benchmarks_memory_is_that_of_its_steps():
    """What a step holds grows with the batch: measured here, in this process."""
    arguments = BenchmarkArguments(layers=1, image_size=112, device="cpu", batch_size=16)
    peak, step = benchmark.peak_memory("lora", arguments)
    assert peak > step > 10 * benchmark.MEBIBYTE


def test_the_benchmarks_memory_is_that_of_tensors():
    """A searching step saves for backward what LoRA's saves; holes that an allocator leaves are no difference."""
    arguments = BenchmarkArguments(layers=2, image_size=224, batch_size=4, device="cpu")
    rows = benchmark.memory(["lora", "search"], arguments)
    found = {row["method"]: row["value"] for row in rows if row["metric"] == "step_bytes_ratio"}
    assert 0.9 < found["search"] < 1.1


def test_the_benchmarks_cases_share_what_is_frozen():
    """A copy that is dropped again would be the peak of a process whose steps need less."""
    arguments = BenchmarkArguments(layers=1, image_size=28, device="cpu")
    base = benchmark.new_base(arguments)
    with Operations() as building:
        case = Case("lora", arguments, base)
    assert not building.seen[aten.clone, base.dinov2.encoder.layer[0].mlp.fc1.weight.shape]
    weight = base.dinov2.encoder.layer[0].mlp.fc1.weight
    own = case.model.get_base_model().dinov2.encoder.layer[0].mlp.fc1.base_layer.weight
    assert own.data_ptr() == weight.data_ptr()
    assert weight.requires_grad
    assert not own.requires_grad


def test_scaling(tmp_path, monkeypatch, capsys):
    """One line per point, of its own rows; a second run measures only what is new."""

    def measured(point):
        asked.append((point.batch_size, point.lora_r))
        row = {"arguments": benchmark.stated(point), "n": 1}
        values = {("lora", "step_seconds"): point.batch_size, ("lora", "step_ratio"): 1.0}
        values |= {("lora", "step_bytes"): 2**20 * point.lora_r, ("search", "blocks"): 6}
        values |= {("search", "step_seconds"): 0.5, ("search", "step_ratio"): 0.5 / point.batch_size}
        values |= {("search", "step_bytes"): 2**20, ("search", "step_bytes_ratio"): 1 / point.lora_r}
        values |= {("search", "machinery_ratio"): 0.01}
        return [{**row, "method": m, "metric": n, "value": value} for (m, n), value in values.items()]

    class Here:
        """In place of a process."""

        def __init__(self, *args, **kwargs):
            self.submit = lambda function, point: SimpleNamespace(result=lambda: function(point))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(scaling, "measured_rows", measured)
    monkeypatch.setattr(scaling, "ProcessPoolExecutor", Here)
    asked = []
    common = ["--batch_size", "4", "--only", "search", "--output_dir", str(tmp_path), "--vary", "lora_r=2,8"]
    scaling.main(common)
    scaling.main([*common, "batch_size=1"])
    assert asked == [(4, 16), (4, 2), (4, 8), (1, 16)]
    lines = (tmp_path / "scaling.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]
    assert cells[0] == ["point", "blocks", "lora: ms", "search: step", "lora: MiB", "search: memory", "gates %"]
    assert cells[1] == ["dinov2-s, batch_size 4, lora_r 16", "6", "4,000", "0.12", "16", "0.06", "1.00"]
    assert cells[3:] == [
        ["lora_r 8", "6", "4,000", "0.12", "8", "0.12", "1.00"],
        ["batch_size 1", "6", "1,000", "0.50", "16", "0.06", "1.00"],
    ]
    assert "\n".join(lines) in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "scaling.png").std() > 0.02


@pytest.mark.parametrize(
    "other", [{"layers": 3}, {"only": ["full"]}, {"batch_size": 2, "only": ["full"]}, {"model": "clip-b16"}]
)
def test_scaling_draws_what_was_measured(tmp_path, other):
    """Without the searching case, without memory of a method, and beside points that no axis can place."""
    rows = []
    for own in ({}, other):
        arguments = benchmark.stated(BenchmarkArguments(device="cpu", **{"only": ["frozen@0.25 late"]} | own))
        for metric in ("step_seconds", "step_ratio", "step_bytes"):
            rows.append({"arguments": arguments, "method": "lora", "metric": metric, "value": 1.0, "n": 1})
        rows.append({**rows[0], "arguments": arguments, "method": "frozen@0.25 late"})
    growth(scaling.by_point(rows), rows[0]["arguments"], tmp_path / "scaling.png")
    assert matplotlib.image.imread(tmp_path / "scaling.png").std() > 0


@pytest.mark.parametrize("vary", ["depth=3", "lora_r=", "lora_r=two"])
def test_scaling_refuses_what_cannot_be_varied(vary):
    with pytest.raises(ValueError, match=f"--vary {vary}: give NAME=VALUE,VALUE with numbers for model, layers"):
        scaling.ScalingArguments(vary=[vary]).points()


def test_published_benchmarks_are_those_of_their_results():
    page = (ROOT / "recipes" / "README.md").read_text()
    scripts = {"benchmark_cpu": (benchmark, "step_time.png"), "benchmark_scaling": (scaling, "scaling.png")}
    folders = [path.parent for path in (ROOT / "recipes" / "results").glob("benchmark_*/results.jsonl")]
    assert {folder.name for folder in folders} == set(scripts)
    for folder in folders:
        script, figure = scripts[folder.name]
        assert script.table(read_results(folder / "results.jsonl")) in page
        assert (folder / figure).is_file()
