"""What makes gates cheap, held without a clock: by counting operations, saved tensors, graphs and host syncs."""

from functools import partial

import pytest
import torch
from backbones import BACKBONES
from conftest import make_trainer
from models import FAMILIES, lora_config, outputs_of, randomize
from operations import Operations, aten
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback

from hf_gatelora import GateConfig, GatedLoraTrainer, attach_gates
from hf_gatelora.config import KINDS

FIRST, LAST = 0, -1  # blocks of the DINOv2: the query of the first layer, the fc2 of the last one


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
