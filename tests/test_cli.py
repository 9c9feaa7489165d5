"""The `gatelora` command: every subcommand on adapters of the tiny world, wrong arguments included."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from accelerate.commands import env
from accelerate.commands.config import config_args
from datasets import ClassLabel
from models import FAMILIES, VISION, lora_config, outputs_of, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)
from world import NAMES, ROOT, dataset

from hf_gatelora import GateConfig, attach_gates
from hf_gatelora.adapters import doctor
from hf_gatelora.cli import main
from hf_gatelora.records import read_results, write_results

OPEN = ["vision_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc2"]


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    """A gated adapter of the tiny CLIP, its checkpoint before the freeze, and stock adapters of CLIP and DINOv2."""
    root = tmp_path_factory.mktemp("adapters")
    model = get_peft_model(CLIPModel.from_pretrained(world / "model"), lora_config(FAMILIES["clip"]["model"]()))
    gates = attach_gates(model, GateConfig(target_active=2 / 18))
    randomize(model)
    gates.set_scores([0.2 if name in OPEN else 0.12 if "fc" in name else 0.0 for name in gates.names])
    gates.save_folded(root / "checkpoint")
    gates.freeze()
    gates.save_folded(root / "gated")
    model = get_peft_model(CLIPModel.from_pretrained(world / "model"), LoraConfig(target_modules=["fc1"], r=2))
    randomize(model)
    model.save_pretrained(root / "stock")
    base = Dinov2ForImageClassification.from_pretrained(world / "dinov2")
    model = get_peft_model(base, LoraConfig(target_modules=["fc1"], r=2, modules_to_save=["classifier"]))
    randomize(model)
    model.save_pretrained(root / "headed")
    model = Dinov2ForImageClassification.from_pretrained(world / "dinov2")
    get_peft_model(model, LoraConfig(target_modules=["fc1"], bias="all")).save_pretrained(root / "biased")
    shutil.copytree(root / "stock", root / "broken")
    (root / "broken" / "gates.json").write_text("{}")
    return root


@pytest.fixture
def gatelora(capsys):
    """`gatelora(*words)`: exit status, stdout and stderr of the command."""

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:  # of argparse
            status = end.code
        return status, *capsys.readouterr()

    return run


def outputs(model):
    return outputs_of(FAMILIES["clip"], model.eval())


def test_help_is_light_and_names_every_command(gatelora):
    code = "import sys; from hf_gatelora.cli import parser; parser().format_help(); print(set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not [name for name in ("torch", "numpy", "transformers", "peft") if f"'{name}'" in found]
    status, commands, _ = gatelora("--help")
    assert status == 0
    for command in ("doctor", "inspect", "evaluate", "fold", "merge", "wise", "combine", "card", "push"):
        assert f"\n    {command} " in commands
        status, out, _ = gatelora(command, "--help")
        assert (status, "usage: gatelora" in out) == (0, True)


def test_inspect(adapters, gatelora, tmp_path):
    status, out, _ = gatelora("inspect", adapters / "gated", "--map", tmp_path / "map.png")
    assert status == 0
    assert out.startswith("2 of 18 blocks open (11.1%), phase consolidate")
    assert matplotlib.image.imread(tmp_path / "map.png").std() > 0.05
    lines = [line.split() for line in out.splitlines()]
    assert ["0", *(".", ".", ".", ".", "#", ".")] in lines  # the first vision layer, where fc1 is the fifth module
    assert ["+0.200", OPEN[0]] in lines
    status, out, _ = gatelora("inspect", adapters / "gated", "--json")
    report = json.loads(out)
    assert (report["open"], report["gates"], report["r"]) == (2, 18, 4)
    size = sum(f.stat().st_size for f in (adapters / "gated").glob("adapter_model.*"))
    assert (report["bytes"], report["lora_parameters"]) == (size, 2 * 4 * (16 + 32))
    assert gatelora("inspect", adapters / "biased")[1].count(".bias") == 3
    status, out, _ = gatelora("inspect", adapters / "checkpoint")
    assert "WARNING: not frozen yet, so blocks can still open and close; 18 are in the file" in out


def test_inspect_two(adapters, gatelora):
    status, out, _ = gatelora("inspect", adapters / "gated", adapters / "stock")
    assert status == 0
    assert "LoRA of rank 2, alpha 8, on 3 modules" in out
    assert "Blocks in both: 1 (25.0% of those in either)" in out
    assert ["all", "1", "1", "2"] in [line.split() for line in out.splitlines()]
    assert "WARNING" not in out
    assert "they name different base models" in gatelora("inspect", adapters / "gated", adapters / "headed")[1]
    assert json.loads(gatelora("inspect", adapters / "gated", adapters / "stock", "--json")[1])["overlap"]["both"]


def test_fold_wise_combine_and_merge(adapters, world, gatelora, tmp_path):
    base = world / "model"

    def load(folder):
        return outputs(PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder))

    assert gatelora("fold", adapters / "checkpoint", tmp_path / "folded")[0] == 0
    assert torch.equal(load(tmp_path / "folded"), load(adapters / "checkpoint"))
    assert json.loads(gatelora("inspect", tmp_path / "folded", "--json")[1])["modules"].keys() == {
        name for name, _ in CLIPModel.from_pretrained(base).named_modules() if name.endswith(("fc1", "fc2"))
    }
    assert gatelora("wise", adapters / "gated", "0", tmp_path / "none")[0] == 0
    assert torch.equal(load(tmp_path / "none"), outputs(CLIPModel.from_pretrained(base)))
    half = f"{adapters / 'gated'}=0.5"
    status, out, _ = gatelora("combine", half, half, tmp_path / "same", "--json")
    assert (status, json.loads(out)["weights"]) == (0, [[str(adapters / "gated"), 0.5]] * 2)
    torch.testing.assert_close(load(tmp_path / "same"), load(adapters / "gated"))

    assert gatelora("merge", adapters / "gated", tmp_path / "merged")[0] == 0
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), load(adapters / "gated"), atol=1e-4, rtol=0)
    assert merged.state_dict().keys() == CLIPModel.from_pretrained(base).state_dict().keys()
    words = AutoProcessor.from_pretrained(tmp_path / "merged").tokenizer("a red square")
    assert words["input_ids"] == AutoTokenizer.from_pretrained(base)("a red square")["input_ids"]
    assert gatelora("merge", adapters / "stock", tmp_path / "half")[0] == 0
    (tmp_path / "half" / "model.safetensors.index.json").write_text("{}")  # of an earlier merge, in several files
    _, out, _ = gatelora("merge", adapters / "stock", tmp_path / "half", "--dtype", "bfloat16", "--json")
    assert json.loads(out)["dtype"] == "bfloat16"
    assert [file.name for file in (tmp_path / "half").glob("model*")] == ["model.safetensors"]
    assert AutoModel.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert not [path for path in tmp_path.rglob("*") if "tmp-" in path.name]


def test_merge_makes_room_for_the_adapters_head(world, gatelora, tmp_path):
    """The base has a head for four classes, or none; the adapter brings one for three."""
    Dinov2Model.from_pretrained(world / "dinov2").save_pretrained(tmp_path / "headless")
    settings = {"num_labels": 3, "ignore_mismatched_sizes": True}
    for base in (world / "dinov2", tmp_path / "headless"):
        model = Dinov2ForImageClassification.from_pretrained(base, **settings)
        model = get_peft_model(model, LoraConfig(target_modules=["fc1"], modules_to_save=["classifier"]))
        randomize(model)
        model.save_pretrained(tmp_path / "three")
        assert gatelora("merge", tmp_path / "three", tmp_path / "merged")[0] == 0
        merged = Dinov2ForImageClassification.from_pretrained(tmp_path / "merged")
        found = outputs_of(FAMILIES["dinov2"], merged.eval())
        torch.testing.assert_close(found, outputs_of(FAMILIES["dinov2"], model.eval()), atol=1e-4, rtol=0)


def test_merge_writes_the_whole_processor_and_the_class_names(adapters, world, gatelora, tmp_path):
    """Where the adapter's folder has the image processor alone, and where the base does not know the classes."""
    shutil.copytree(adapters / "stock", tmp_path / "clip")
    AutoImageProcessor.from_pretrained(world / "model").save_pretrained(tmp_path / "clip")
    assert gatelora("merge", tmp_path / "clip", tmp_path / "merged")[0] == 0
    found, expected = (AutoTokenizer.from_pretrained(f)("a red square") for f in (tmp_path / "merged", world / "model"))
    assert found["input_ids"] == expected["input_ids"]
    base = Dinov2ForImageClassification.from_pretrained(world / "dinov2")
    base.config.id2label = dict(enumerate("wxyz"))
    model = get_peft_model(base, lora_config(base, modules_to_save=["classifier"]))
    attach_gates(model, GateConfig(target_active=0.2)).save_folded(tmp_path / "headed")
    assert gatelora("merge", tmp_path / "headed", tmp_path / "headed-merged")[0] == 0
    config = Dinov2ForImageClassification.from_pretrained(tmp_path / "headed-merged").config
    assert (list(config.id2label.values()), config.label2id["z"]) == (list("wxyz"), 3)


def test_merge_into_a_vit_that_was_published_without_its_pooler(gatelora, tmp_path):
    base = ViTModel(ViTConfig(**VISION), add_pooling_layer=False)
    base.save_pretrained(tmp_path / "base")
    model = ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    model = get_peft_model(model, LoraConfig(target_modules=["fc1"], r=2))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    assert gatelora("merge", tmp_path / "adapter", tmp_path / "merged")[0] == 0
    merged = ViTModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False).eval()
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        found, expected = (m(**pixels).last_hidden_state for m in (merged, model.eval()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_evaluate_clip(adapters, world, gatelora, tmp_path):
    """Against the logits of stock PEFT; rows of other measurements stay in the results file."""
    other = {"role": "cost", "data": "train", "split": "", "metric": "adapter_bytes", "value": 1, "n": 1}
    old = {**other, "role": "id", "data": "test", "metric": "top1"}
    write_results([{"method": "mine", "seed": 3, **row} for row in (other, old)], adapters / "gated" / "results.jsonl")
    line = ["--id", world / "data.parquet", "--retention", f"old={world / 'saved'}", "--prompt", "a {} square"]
    status, out, _ = gatelora("evaluate", adapters / "gated", *line, "--wise", "0", "0.5")
    assert status == 0
    rows = read_results(adapters / "gated" / "results.jsonl")
    assert rows[0] == {"method": "mine", "seed": 3, **other}
    rows = rows[1:]
    assert {row["method"] for row in rows} == {"base", "mine"}
    assert {row["seed"] for row in rows} == {3}
    assert all(row["arguments"]["id"] == str(world / "data.parquet") and row["versions"]["peft"] for row in rows)
    values = {(r["method"], r["data"], r["metric"], r.get("wise")): r["value"] for r in rows}
    assert len(values) == len(rows) == 16
    for data in ("test", "old"):
        scores = [values["mine", data, "ece", scale] for scale in (0.0, 0.5, None)]
        assert scores[0] == values["base", data, "ece", None]
        assert len(set(scores)) == 3
    base = CLIPModel.from_pretrained(world / "model")
    processor = AutoProcessor.from_pretrained(world / "model")
    images, texts = dataset()["image"][:], [f"a {name} square" for name in NAMES]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    inputs = {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    labels = torch.arange(16) % 4
    for method in ("base", "mine"):
        model = base if method == "base" else PeftModel.from_pretrained(base, adapters / "gated")
        with torch.no_grad():
            logits = model.eval()(**inputs).logits_per_image
        top1 = (logits.argmax(-1) == labels).float().mean().item()
        assert values[method, "test", "top1", None] == pytest.approx(top1)
        assert f"{100 * top1:.1f}" in next(line for line in out.splitlines() if line.startswith("ID test"))


def test_results_of_several_adapters_and_ways(adapters, world, gatelora, tmp_path):
    """One file keeps the adapters apart; what was measured in another way does not stay beside the new rows."""
    file, line = tmp_path / "r.jsonl", ["--id", world / "data.parquet", "--output", tmp_path / "r.jsonl"]

    def measured():
        return sorted((Path(r["adapter"]).name, r["method"], r.get("wise", 1)) for r in read_results(file))[::2]

    gatelora("evaluate", adapters / "checkpoint", *line, "--prompt", "a {}", "--wise", "0.5")
    gatelora("evaluate", adapters / "stock", *line, "--prompt", "a {}")
    first = [("checkpoint", "base", 1), ("checkpoint", "gated", 0.5), ("checkpoint", "gated", 1)]
    second = [("stock", "base", 1), ("stock", "lora", 1)]
    assert measured() == [*first, *second]
    gatelora("evaluate", adapters / "checkpoint", *line, "--prompt", "a {}", "--batch-size", "3")
    assert measured() == [*first, *second]
    err = gatelora("evaluate", adapters / "checkpoint", *line, "--prompt", "a {} square")[2]
    assert measured() == [first[0], first[2], *second]
    assert "dropped what was measured of gated at scale 0.5 on 'test' with another templates" in err


def test_evaluate_measures_as_the_run_did(adapters, world, gatelora, tmp_path):
    """With the run's prompts and neighbours, unless others are given."""
    shutil.copytree(adapters / "stock", tmp_path / "clip")
    shutil.copytree(adapters / "headed", tmp_path / "dino")
    row = {"method": "lora", "role": "ood", "data": "x", "split": "", "metric": "top1", "value": 1, "n": 1}
    ways = {"clip": {"prompt": "a {} square", "templates": None}, "dino": {"knn_k": 3, "knn_temperature": 0.5}}
    for name, arguments in ways.items():
        write_results([{**row, "arguments": arguments}], tmp_path / name / "results.jsonl")

    def stated(name, *more):
        out = gatelora("evaluate", tmp_path / name, "--id", world / "saved", "--json", *more)[1]
        return json.loads(out)[0]["arguments"]

    assert stated("clip")["templates"] == ["a {} square"]
    assert stated("clip", "--prompt", "{}")["templates"] == ["{}"]
    found = stated("dino", "--bank", f"test={world / 'data.parquet'}")
    assert (found["k"], found["temperature"]) == (3, 0.5)
    assert stated("dino", "--bank", f"test={world / 'data.parquet'}", "--knn-k", "2")["k"] == 2


def test_evaluate_a_classifier(adapters, world, gatelora, tmp_path):
    """The base is measured by a head only where it is told which; classes are matched by name."""
    line = ["evaluate", adapters / "headed", "--id", world / "data.parquet", "--ood", f"two={world / 'folder'}"]
    line += ["--retention", f"old={world / 'saved'}", "--bank", f"old={world / 'data.parquet'}", "--knn-k", "3"]
    status, out, err = gatelora(*line, "--json")
    assert status == 0
    assert "The adapter brought its head" in err
    rows = {(r["method"], r["data"], r["metric"]): r for r in json.loads(out)}
    assert {key[1:] for key in rows if key[0] == "base"} == {("old", m) for m in ("top1", "ece", "knn_top1")}
    assert rows["lora", "two", "top1"]["n"] == 2
    status, out, err = gatelora(*line, "--model", world / "dinov2", "--wise", "0", "--json")
    rows = {(r["method"], r["data"], r["metric"], r.get("wise")): r["value"] for r in json.loads(out)}
    assert rows["base", "test", "top1", None] == rows["lora", "test", "top1", 0.0]
    assert (status, err.count("brought its head")) == (0, 0)
    status, _, err = gatelora(*line, "--wise", "0.5")
    assert (status, "cannot be scaled" in err) == (2, True)


@pytest.mark.parametrize("spelling", [str, str.upper])
def test_classes_are_matched_by_name(adapters, world, gatelora, tmp_path, spelling):
    """String labels sort as blue, green, grey, red; the head's order is another, and is known to its base."""
    data = dataset()
    strings = [spelling(NAMES[label]) for label in data["label"]]
    data.remove_columns("label").add_column("label", strings).to_parquet(tmp_path / "data.parquet")
    base = Dinov2ForImageClassification.from_pretrained(world / "dinov2")
    model = PeftModel.from_pretrained(base, adapters / "headed").eval()
    images = AutoProcessor.from_pretrained(world / "dinov2")(data["image"][:], return_tensors="pt")
    with torch.no_grad():
        named = model(**images).logits.argmax(-1)
    expected = sum(spelling(NAMES[i]) == label for i, label in zip(named, strings, strict=True)) / len(strings)
    line = ["evaluate", adapters / "headed", "--id", tmp_path / "data.parquet", "--output", tmp_path / "r.jsonl"]
    status, out, err = gatelora(*line, "--json")
    found = next(row for row in json.loads(out) if row["metric"] == "top1")
    assert (status, found["value"], "no known names" in err) == (0, expected, False)


def test_evaluate_a_backbone_without_a_head(world, gatelora, tmp_path):
    Dinov2Model.from_pretrained(world / "dinov2").save_pretrained(tmp_path / "base")
    AutoProcessor.from_pretrained(world / "dinov2").save_pretrained(tmp_path / "base")
    model = get_peft_model(Dinov2Model.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["fc1"]))
    model.save_pretrained(tmp_path / "adapter")
    line = ["evaluate", tmp_path / "adapter", "--id", world / "saved", "--knn-k", "1", "--json"]
    status, out, _ = gatelora(*line, "--bank", f"test={world / 'data.parquet'}")
    assert status == 0
    assert {(r["method"], r["metric"], r["value"]) for r in json.loads(out)} == {
        (m, "knn_top1", 1.0) for m in ("base", "lora")
    }
    status, _, err = gatelora(*line)
    assert (status, "Nothing is measured on the id set 'test'" in err) == (2, True)


def test_doctor(world, gatelora):
    status, out, _ = gatelora("doctor", world / "model", "--budget", '{"vision": 0.25, "text": 0}', "--rank", "4")
    assert status == 0
    assert "18 blocks would be gated (LoRA of rank 4 on lora_targets(model))" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["vision_model", *"222222", "12"] in lines
    assert "A budget of 0.25 on 'vision' keeps 3 of 12 blocks open." in out
    expected = get_peft_model(FAMILIES["clip"]["model"](), lora_config(FAMILIES["clip"]["model"]()))
    trainable, _ = expected.get_nb_trainable_parameters()
    assert f"{trainable:,} LoRA parameters" in out
    assert out.splitlines()[-1].startswith("Verdict: This can be trained: 3 of 18 blocks would stay open.")
    assert "visual_projection, text_projection" in out
    status, out, _ = gatelora("doctor", world / "dinov2", "--target-modules", "query", "fc1", "classifier")
    assert status == 1
    assert "'query' is called q_proj since transformers 5" in out
    assert "target_active=0.05 of 3 gates rounds to 0 open gates" in out
    assert "heads or projections would be gated too: classifier" in out
    assert "dinov2 o_proj (x2)" in out
    status, out, _ = gatelora("doctor", world / "dinov2", "--target-modules", "all-linear", "--json")
    assert (json.loads(out)["model"]["heads"], json.loads(out)["model"]["gates"]) == ([], 12)
    status, out, _ = gatelora("doctor", world / "model", "--target-modules", "token_embedding", "--json")
    assert (status, "cannot be gated" in json.loads(out)["model"]["problems"][0]) == (1, True)


def test_doctor_of_the_machine(gatelora, monkeypatch, tmp_path):
    found = json.loads(gatelora("doctor", "--json")[1])["environment"]
    assert set(found["launchers"]) == {file.stem for file in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    file = tmp_path / "default.yaml"
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    for module in (env, config_args):
        monkeypatch.setattr(module, "default_config_file", str(file))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "package_versions", lambda names: {"torch": "1"})
    status, out, _ = gatelora("doctor")
    assert status == 0
    assert f"PyTorch version: {torch.__version__}" in out
    assert "distributed_type MULTI_CPU, num_processes 2" in out
    assert "WARNING: no MPI" in out
    assert 'deepspeed_zero2  no: DeepSpeed is not installed: pip install "hf_gatelora[deepspeed]"' in out
    assert "Verdict: This machine can launch cpu, multi_cpu" in out.splitlines()[-1]
    for broken in ("distributed_type: NONE", "num_processes: [", "x"):
        file.write_text(broken)
        status, _, err = gatelora("doctor")
        assert (status, "accelerate's default config, cannot be read" in err) == (2, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "required: COMMAND"),
        ("inspct x", "invalid choice: 'inspct'"),
        ("inspect {adapters}", "There is one in biased, broken, checkpoint, gated, headed, stock"),
        ("inspect {adapters}/nothing/here", "no such folder"),
        ("inspect user/repo", "is not a local folder and could not be downloaded from the Hub"),
        ("inspect {adapters}/stock --map x.png", "there are no scores to draw"),
        ("doctor {adapters}/gated", "is an adapter, not a model"),
        ("doctor {world}/folder", "is not a model that transformers can load"),
        ("doctor {world}/model --budget 1.5", "out of range"),
        ("doctor {world}/model --budget half", "neither a number nor JSON"),
        ("doctor {world}/model --rank 0", "'0' is not a positive whole number"),
        ("doctor --target-modules q_proj {world}/model", "options need a MODEL: put it first"),
        ("doctor --rank 8", "options need a MODEL: put it first"),
        ("inspect {adapters}/broken", "gates.json: blocks: Field required"),
        ("fold {adapters}/broken {new}", "gates.json: blocks: Field required"),
        ("fold {adapters}/stock {new}", "there is nothing to fold"),
        ("merge {adapters}/gated {adapters}/stock", "holds an adapter that `merge` did not write from"),
        ("merge {adapters}/gated {new} --model {world}/dinov2", "that is a dinov2, not a CLIPModel"),
        ("merge {adapters}/biased {new}", "it trained biases (bias='all')"),
        ("merge {adapters}/gated {new} --model {world}/nothing", "is not a model that transformers can load"),
        ("wise {adapters}/gated 0.5 {world}/model", "holds a model that `wise` did not write from"),
        ("wise {adapters}/gated 1.5 {new}", "scale=1.5 is out of range"),
        ("wise {adapters}/gated half {new}", "invalid float value: 'half'"),
        ("wise {adapters}/headed 0.5 {new}", "pass the base model whose head it replaces (--model)"),
        ("combine {adapters}/gated=much {adapters}/stock {new}", "'much' is not a number"),
        ("combine {adapters}/gated {adapters}/stock", "required: OUTPUT"),
        ("card {adapters}/nothing", "is not a local folder"),
        ("card {adapters}/stock --base {world}/model", "is not the Hub id of a model"),
        ("push {adapters}/stock user/repo --hub_tokn hf_abcdefghijklmnopqrstuvwxyz", "arguments: --hub_tokn *** (see"),
        ("combine {adapters}/gated {adapters}/headed {new}", "are on different base models"),
        ("evaluate {adapters}/gated", "There is nothing to measure"),
        ("evaluate {adapters}/gated --ood {world}/saved", "give name=source"),
        ("evaluate {adapters}/gated --id {world}/none.parquet", "no such file or folder"),
        ("evaluate {adapters}/gated --id {world}/saved --prompt photo", "has no {{}} for the class name"),
        ("evaluate {adapters}/gated --id {world}/saved --wise 2", "out of range"),
        ("evaluate {adapters}/headed --id {world}/saved --bank old={world}/saved", "The bank 'old' belongs to no set"),
        (
            "evaluate {adapters}/headed --id {world}/saved --head-label-map old={world}/x",
            "The head label map 'old' belongs to no retention set",
        ),
        ("evaluate {adapters}/gated --id {world}/saved --prompt {{}} --templates simple", "not allowed with argument"),
        ("evaluate {adapters}/gated --id {world}/saved --bank test={world}/data.parquet", "are for vision backbones"),
        ("evaluate {adapters}/headed --id {world}/saved --prompt {{}}", "are for CLIPModel"),
        ("evaluate {adapters}/headed --id {world}/saved --retrieval", "are for CLIPModel"),
        ("evaluate {adapters}/gated --id {world}/saved --device tpu9", "device='tpu9' cannot be used here"),
        ("evaluate {adapters}/gated --id {world}/saved --output {world}", "is a folder: give a file"),
        ("evaluate user/repo --id {world}/saved", "give --output FILE"),
    ],
)
def test_bad_input(adapters, world, gatelora, tmp_path, line, message):
    known = {"adapters": adapters, "world": world, "new": tmp_path / "new"}
    status, out, err = gatelora(*line.format(**known).split(), "--json")
    report, said = json.loads(out), err.splitlines()[-1:]
    if "--budget 1.5" in line:  # found by the check, not refused
        assert (status, message in report["model"]["problems"][0]) == (1, True)
        assert "cannot be trained as asked" in report["verdict"]
    else:
        assert (status, f"gatelora: {report['error']}") == (2, *said)
        assert message.format() in report["error"]
    assert not (tmp_path / "new").exists()
    assert "Traceback" not in err
    assert "abcdefghij" not in out + err


@pytest.mark.parametrize("command", ["fold", "wise", "combine", "merge"])
def test_outputs_of_others_are_kept_without_force(adapters, gatelora, tmp_path, command):
    other, sources = shutil.copytree(adapters / "headed", tmp_path / "other"), [adapters / "gated"]
    before = {file.name: file.read_bytes() for file in other.iterdir()}
    extra = {"fold": [], "merge": [], "wise": ["0.5"], "combine": [adapters / "stock"]}[command]
    status, _, err = gatelora(command, *sources, *extra, other)
    assert (status, "--force" in err, len(err.splitlines())) == (2, True, 1)
    assert {file.name: file.read_bytes() for file in other.iterdir()} == before
    for line in ([*extra, other, "--force"], [*extra, other]):  # its own output it writes again
        assert gatelora(command, *sources, *line)[0] == 0
    assert (other / "adapter_model.safetensors").is_file() == (command != "merge")


def test_nothing_commands_the_terminal(adapters, gatelora, tmp_path):
    folder = shutil.copytree(adapters / "gated", tmp_path / "gated")
    text = (folder / "gates.json").read_text()
    (folder / "gates.json").write_text(text.replace(OPEN[0], OPEN[0] + r"\u202e"))
    status, out, _ = gatelora("inspect", folder)
    assert (status, OPEN[0] + r"\u202e" in out) == (0, True)
    for line in (["inspect", "\x1b[2J/a/b"], ["inspect", folder, "\x9b2J/a/b"], ["doctor", "--rank", "\x1b[2J"]):
        status, out, err = gatelora(*line)
        assert (status, out, "\x1b" in err, "\x9b" in err) == (2, "", False, False)
        assert err.count(r"\x1b[2J") + err.count(r"\x9b2J") == 1


def test_a_fault_of_ours_is_one_sentence_too(gatelora, monkeypatch):
    monkeypatch.setattr("hf_gatelora.cli.inspect.inspect_adapter", lambda source: {}["key"])
    status, out, err = gatelora("inspect", "x")
    assert (status, out, err.count("\n"), "KeyError: 'key'. If the input is intact" in err) == (2, "", 1, True)


def test_no_code_of_a_model_is_run(gatelora, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    status, _, err = gatelora("doctor", tmp_path)
    assert (status, "custom code" in err) == (2, True)
    assert not (tmp_path / "ran").exists()


def test_classes_that_the_head_does_not_have(adapters, world, gatelora, tmp_path):
    data = dataset(4, label=ClassLabel(names=["a", "b", "c", "d", "e"]))
    data.to_parquet(tmp_path / "other.parquet")
    status, _, err = gatelora("evaluate", adapters / "headed", "--id", tmp_path / "other.parquet")
    assert (status, "tells 4 classes apart (red, green, blue, ...), the set has 5" in err) == (2, True)
    dataset(4, label=ClassLabel(names=["red", "green", "blue", "pink"])).to_parquet(tmp_path / "as_many.parquet")
    status, _, err = gatelora("evaluate", adapters / "headed", "--id", tmp_path / "as_many.parquet")
    assert (status, "(red, green, blue, ...), the set has 4" in err) == (2, True)
