"""What is said about gain and retention: suites, the DINOv2 recipe, WiSE-FT, the comparison, the callback."""

import json
import shutil

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import make_trainer
from models import FAMILIES, Images, lora_config, outputs_of, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from transformers import (
    AutoImageProcessor,
    CLIPForImageClassification,
    CLIPModel,
    Dinov2ForImageClassification,
    EarlyStoppingCallback,
    SiglipForImageClassification,
    ViTForImageClassification,
)
from world import NAMES, RECIPES, dataset, parse, run, words

from hf_gatelora import GateConfig, RetentionCallback, attach_gates
from hf_gatelora.adapters.export import scale_adapter, scaled
from hf_gatelora.evaluation import images as sources
from hf_gatelora.evaluation.backbone import backbone_features, split_classifier
from hf_gatelora.evaluation.suite import ClassifierSuite, EvalSet
from hf_gatelora.records import read_results

# isort: split
import compare
import tables
import train_dinov2


def values(rows, **wanted):
    """`{(data, metric): value}` of the rows that have these fields; a row without `wise` has scale 1."""
    rows = [{"wise": 1.0, **row} for row in rows if row["role"] != "cost"]
    wanted = {"wise": 1.0, **wanted}
    return {
        (row["data"], row["metric"]): row["value"]
        for row in rows
        if all(row[field] == value for field, value in wanted.items())
    }


def labelled(processor, source):
    """Images of a source as rows, their pixel values and labels."""
    images = sources.LabelledImages(str(source), lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
    return images, torch.stack([row["pixel_values"] for row in images]), images.labels


def test_dinov2_recipe(world, tmp_path):
    line = ["--retention", f"old={world / 'saved'}", "--bank", f"old={world / 'data.parquet'}", "--knn_k", "3"]
    line += ["--ood", f"one={world / 'folder'}", "--max_steps", "40", "--wise", "0"]
    line = [*words(world, tmp_path / "out", "dinov2"), *line]
    run("dinov2", line)
    rows = read_results(tmp_path / "out" / "results.jsonl")
    sets = {("test", "top1"), ("test", "ece"), ("one", "top1"), ("one", "ece")}
    sets |= {("old", metric) for metric in ("top1", "ece", "knn_top1")}
    for method in ("base", "gated"):
        assert set(values(rows, method=method)) == sets
    # At scale 0 the head is that of the base as well.
    assert values(rows, method="gated", wise=0.0) == values(rows, method="base")
    # The folder of images has some of the classes, in another order.
    assert values(rows, method="gated")["one", "top1"] == 1.0
    assert values(rows, method="gated")["test", "top1"] >= values(rows, method="base")["test", "top1"]

    # Retention is measured on the tuned backbone, with the head that was published and with neighbours.
    published = Dinov2ForImageClassification.from_pretrained(world / "dinov2").eval()
    base, _, _ = train_dinov2.prepare(*parse("dinov2", line))
    tuned = PeftModel.from_pretrained(base(), tmp_path / "out" / "gated").eval()
    processor = AutoImageProcessor.from_pretrained(world / "dinov2")
    images, pixels, labels = labelled(processor, world / "saved")
    _, bank, bank_labels = labelled(processor, world / "data.parquet")
    with torch.no_grad():
        backbone = tuned.get_base_model().dinov2
        hidden, neighbours = (backbone(pixel_values=p).last_hidden_state for p in (pixels, bank))
        logits = published.classifier(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=-1))
    torch.testing.assert_close(backbone_features(tuned, images, 3).pooled, hidden[:, 0])
    found = values(rows, method="gated")
    assert found["old", "top1"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    votes = KNeighborsClassifier(3, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    votes.fit(neighbours[:, 0].double(), bank_labels)
    assert found["old", "knn_top1"] == pytest.approx(votes.score(hidden[:, 0].double(), labels))


def test_a_base_with_a_new_head_is_not_measured_by_it(world, tmp_path):
    """Without the fit the head is random: the base has no accuracy on the new classes, and the tuned model has."""
    line = [*words(world, tmp_path / "out", "dinov2"), "--probe_first", "false", "--max_steps", "4", "--knn_k", "3"]
    run("dinov2", [*line, "--retention", f"old={world / 'saved'}", "--bank", f"old={world / 'data.parquet'}"])
    rows = read_results(tmp_path / "out" / "results.jsonl")
    old = {("old", metric) for metric in ("top1", "ece", "knn_top1")}
    assert set(values(rows, method="base")) == old
    assert set(values(rows, method="gated")) == old | {("test", "top1"), ("test", "ece")}


def test_a_published_head_without_the_classes_needs_a_bank(world, tmp_path):
    model = Dinov2ForImageClassification.from_pretrained(world / "dinov2")
    model.config.id2label = {i: f"class {i}" for i in range(4)}
    model.save_pretrained(tmp_path / "unnamed")
    AutoImageProcessor.from_pretrained(world / "dinov2").save_pretrained(tmp_path / "unnamed")
    line = [*words(world, tmp_path / "out", "dinov2"), "--model", str(tmp_path / "unnamed")]
    line += ["--retention", f"old={world / 'saved'}"]

    def suite(*more):
        return train_dinov2.prepare(*parse("dinov2", [*line, *more]))[1]

    with pytest.raises(ValueError, match=r"'old' cannot be measured: the published head does not have its classes"):
        suite()
    mapped = ["--head_label_map", f"old={tmp_path / 'map.json'}"]
    for mapping in ({"red": 2, "green": 0, "blue": 1, "grey": 3}, {"0": 2, "1": 0, "2": 1, "3": 3}):
        (tmp_path / "map.json").write_text(json.dumps(mapping))
        assert suite(*mapped).head_classes["old"].tolist() == [2, 0, 1, 3]
    (tmp_path / "map.json").write_text(json.dumps({"red": 2, "green": 9}))
    with pytest.raises(ValueError, match=r"gives 3 of the 4 classes of 'old' no output .*first: 'green'"):
        suite(*mapped)
    dataset(4).remove_columns("label").to_parquet(tmp_path / "unlabelled.parquet")
    with pytest.raises(ValueError, match=r"id set 'test' .* has no labels"):
        suite(*mapped, "--test", str(tmp_path / "unlabelled.parquet"))


def test_every_method_of_a_comparison(world, tmp_path):
    """Every method runs; scale 0 is the base and 1 the adapter; what is finished is not run again."""
    names = ["linear_probe", "full", "lora", "lora_equal", "random", "gated", "gated@0.1"]
    line = ["clip", *words(world, tmp_path), "--retention", f"old={world / 'saved'}", "--methods", *names]
    line += ["--wise", "0", "0.5", "1", "--seeds", "0"]
    compare.main(line)
    rows = read_results(tmp_path / "results.jsonl")
    base = values(rows, method="base")
    assert len(base) == len([row for row in rows if row["method"] == "base"])  # once, though every run measured it
    for method in names[2:]:
        assert values(rows, method=method, wise=0.0) == base
        at_one = [row for row in rows if row["method"] == method and row.get("wise") == 1]
        assert values(at_one) == values([r for r in rows if r["method"] == method and "wise" not in r])
    assert values(rows, method="linear_probe")["old", "top1"] == base["old", "top1"]
    assert values(rows, method="linear_probe")["test", "top1"] > base["test", "top1"]
    blocks = {row["method"]: (row["value"], row["of"]) for row in rows if row["metric"] == "open_blocks"}
    assert blocks == {
        "lora": (18, 18),
        "lora_equal": (18, 18),
        "random": (4, 4),
        "gated": (4, 18),
        "gated@0.1": (2, 18),
    }
    size = {row["method"]: row["value"] for row in rows if row["metric"] == "trainable_parameters"}
    assert size["full"] == sum(p.numel() for p in CLIPModel.from_pretrained(world / "model").parameters())
    assert size["lora_equal"] * 2 == size["lora"]  # rank 1 is the least
    assert matplotlib.image.imread(tmp_path / "frontier.png").std() > 0.02

    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed-0/*/*/adapter_model.safetensors")}
    assert len(times) == 5
    (tmp_path / "seed-0" / "random" / "results.jsonl").unlink()
    compare.main(line)
    again = {file.parts[-3] for file, time in times.items() if file.stat().st_mtime_ns != time}
    assert again == {"random"}
    # The same seed gives the same blocks and weights; only the times differ.
    for old, new in zip(rows, read_results(tmp_path / "results.jsonl"), strict=True):
        assert (old["method"], old["metric"]) == (new["method"], new["metric"])
        assert old["value"] == new["value"] or old["metric"] == "seconds_per_step"


def test_a_linear_probe_of_a_backbone_is_its_base(world, tmp_path):
    """The head is fitted before the blocks are trained; without that, for the probe alone."""
    line = ["dinov2", *words(world, tmp_path, "dinov2"), "--methods", "linear_probe", "--seeds", "0"]
    compare.main(line)
    rows = read_results(tmp_path / "results.jsonl")
    assert values(rows, method="linear_probe") == values(rows, method="base")
    compare.main([*line, "--probe_first", "false", "--output_dir", str(tmp_path / "new")])
    assert values(read_results(tmp_path / "new" / "results.jsonl")) == values(rows, method="linear_probe")


def test_finished_methods_of_other_settings_are_not_taken_over(world, tmp_path):
    line = ["clip", *words(world, tmp_path / "out"), "--methods", "lora", "--seeds", "0"]
    compare.main(line)
    compare.main([*line, "--disable_tqdm", "false"])
    with pytest.raises(ValueError, match=r"written with other settings \(learning_rate, lora_r\)"):
        compare.main([*line, "--learning_rate", "0.03", "--lora_r", "4"])


@pytest.mark.parametrize("budget", ["0.2", '{"vision": 0.25, "text": 0.0}'])
def test_random_blocks_have_the_budget_of_the_gates(world, tmp_path, budget):
    line = ["clip", *words(world, tmp_path), "--methods", "random", "gated", "--gate_target_active", budget]
    compare.main([*line, "--seeds", "0"])
    folders = (tmp_path / "seed-0" / "random" / "lora", tmp_path / "seed-0" / "gated" / "gated")
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    towers = [sorted(target.split("_")[0] for target in config["target_modules"]) for config in configs]
    assert len(towers[0]) == len(towers[1])
    if budget != "0.2":
        assert towers[0] == towers[1] == ["vision"] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--bank", "odl=x"], r"--bank odl=x: its name must be that of a retention set"),
        (["--bank", "old={saved}", "--retention", "old={saved}"], "its images others than that set's own"),
        (["--eval_strategy", "steps"], "needs --validation: the test images are not for choosing"),
    ],
)
def test_refused(world, tmp_path, line, message):
    line = [word.format(saved=world / "saved") for word in line]
    with pytest.raises(ValueError, match=message):
        run("dinov2", [*words(world, tmp_path / "out", "dinov2"), *line])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["lora"], "Give the recipe first, one of clip, dinov2; found 'lora'"),
        (["clip", "--methods", "gated", "lora@0.1"], r"--methods 'lora@0.1' is not known: use some of linear_probe"),
        (["clip", "--methods", "gated@x"], "--methods 'gated@x' is not known"),
        (["clip", "--methods", "random", "--gate_target_active", "none", "--gate_lambda", "1"], "need a budget"),
        (["clip", "--push_to_hub"], "A comparison is not pushed"),
        (["clip", "--report"], "has no finished runs"),
    ],
)
def test_comparisons_that_are_refused(world, tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        compare.main([*line[:1], *words(world, tmp_path / "out"), *line[1:]])


def test_evaluation_during_training_and_resume_of_one_method(world, tmp_path):
    line = [*words(world, tmp_path / "out"), "--methods", "gated", "lora", "--save_steps", "4"]
    line += ["--eval_strategy", "steps", "--eval_steps", "4", "--validation", str(world / "saved")]
    line += ["--validation_retention", f"old={world / 'saved'}"]
    run("clip", line)
    for method in ("gated", "lora"):
        log = json.loads((tmp_path / "out" / method / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in log if "eval_retention_delta" in entry] == [4, 8]
    before = read_results(tmp_path / "out" / "results.jsonl")
    for folder in (tmp_path / "out" / "lora").glob("checkpoint-*"):  # a method that has not started yet
        folder.rename(tmp_path / folder.name)
    run("clip", [*line, "--resume_from_checkpoint", "true"])
    assert values(before, method="lora") == values(read_results(tmp_path / "out" / "results.jsonl"), method="lora")


@pytest.mark.parametrize(
    "family_of", [SiglipForImageClassification, ViTForImageClassification, CLIPForImageClassification]
)
def test_backbones_of_other_families(family_of, tmp_path):
    """Features, head input and logits of any classifier, plain or adapted, agree with its own forward."""
    torch.manual_seed(0)
    config = family_of.config_class()
    vision = getattr(config, "vision_config", config)
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    for name, value in {**tiny, "image_size": 16, "patch_size": 8}.items():
        setattr(vision, name, value)
    config.num_labels = 3
    model = family_of(config).eval()
    data = Images(5)
    features = backbone_features(model, data, 2)
    with torch.no_grad():
        expected = model(pixel_values=data.pixels).logits
        head = split_classifier(model)[2]
        torch.testing.assert_close(features.logits, expected)
        torch.testing.assert_close(head(features.head_input), expected)
    assert features.pooled.shape[0] == 5
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[split_classifier(model)[1]]))
    assert torch.equal(backbone_features(adapted, data, 2).logits, features.logits)


def stock_lora(model, folder):
    """A LoRA adapter that PEFT wrote, with random weights."""
    adapted = get_peft_model(model, lora_config(model))
    randomize(adapted)
    adapted.save_pretrained(folder)


def test_scaled_adapter(family, tmp_path):
    stock_lora(family["model"](), tmp_path / "whole")
    model = PeftModel.from_pretrained(family["model"](), tmp_path / "whole").eval()
    for scale in (0.0, 0.5, 1.0):
        scale_adapter(tmp_path / "whole", scale, tmp_path / f"{scale}")
        written = PeftModel.from_pretrained(family["model"](), tmp_path / f"{scale}").eval()
        with rescale_adapter_scale(model, scale):
            torch.testing.assert_close(outputs_of(family, written), outputs_of(family, model))
    base = family["model"]()
    assert torch.equal(
        outputs_of(family, PeftModel.from_pretrained(family["model"](), tmp_path / "0.0")), outputs_of(family, base)
    )
    assert not [file for file in tmp_path.rglob("*") if "tmp" in file.name]
    odd = {"dora": {"use_dora": True}, "biased": {"bias": "lora_only"}, "olora": {"init_lora_weights": "olora"}}
    head = {"modules_to_save": ["classifier" if family["name"] == "dinov2" else "visual_projection"]}
    for name, settings in {**odd, "headed": head}.items():
        own = family["model"]()
        get_peft_model(own, lora_config(own, **settings)).save_pretrained(tmp_path / name)
    for arguments, message in {
        (tmp_path / "whole", 1.5, tmp_path / "x"): "scale=1.5 is out of range",
        (tmp_path / "whole", 0.5, tmp_path / "whole"): "is the adapter's own folder",
        (tmp_path / "none", 0.5, tmp_path / "x"): "holds no readable adapter",
        (tmp_path / "dora", 0.5, tmp_path / "x"): "cannot be scaled: it uses DoRA",
        (tmp_path / "biased", 0.5, tmp_path / "x"): "cannot be scaled: it trained biases",
        (tmp_path / "olora", 0.5, tmp_path / "x"): "'olora' changed the base weights",
        (tmp_path / "headed", 0.5, tmp_path / "x"): "pass the base model whose head it replaces",
    }.items():
        with pytest.raises(ValueError, match=message):
            scale_adapter(*arguments)


def test_scaled_adapter_with_a_head(tmp_path):
    family = FAMILIES["dinov2"]
    base = family["model"]()
    model = get_peft_model(family["model"](), lora_config(base, modules_to_save=["classifier"]))
    randomize(model)
    with torch.no_grad():
        for parameter in model.base_model.model.classifier.modules_to_save["default"].parameters():
            parameter.add_(1.0)
    model.eval().save_pretrained(tmp_path / "whole")
    tuned = outputs_of(family, model)
    for scale, expected in ((0.0, outputs_of(family, base)), (0.5, None), (1.0, tuned)):
        scale_adapter(tmp_path / "whole", scale, tmp_path / f"{scale}", family["model"]())
        written = outputs_of(family, PeftModel.from_pretrained(family["model"](), tmp_path / f"{scale}"))
        with scaled(model, scale):
            torch.testing.assert_close(written, outputs_of(family, model))
        if expected is not None:
            torch.testing.assert_close(written, expected)
    assert torch.equal(outputs_of(family, model), tuned)


def test_compare(world, tmp_path, capsys):
    line = ["clip", *words(world, tmp_path / "out"), "--retention", f"old={world / 'saved'}", "--wise", "0.5"]
    line += ["--eval_strategy", "steps", "--eval_steps", "8", "--validation", str(world / "saved"), "--max_steps", "40"]
    compare.main([*line, "--seeds", "0", "--methods", "lora"])
    first = tmp_path / "out" / "seed-0" / "lora" / "lora" / "adapter_model.safetensors"
    time = first.stat().st_mtime_ns
    compare.main([*line, "--seeds", "0", "1", "--methods", "lora", "gated"])
    assert first.stat().st_mtime_ns == time
    rows = read_results(tmp_path / "out" / "results.jsonl")
    assert {(row["seed"], row["method"]) for row in rows} == {(s, m) for s in (0, 1) for m in ("base", "lora", "gated")}
    table = (tmp_path / "out" / "comparison.md").read_text()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]] for line in table.splitlines()[2:]}
    assert list(cells) == ["base", "lora", "lora x 0.5", "gated", "gated x 0.5"]
    per_seed = [100 * values(rows, method="gated", seed=s, wise=0.5)["test", "top1"] for s in (0, 1)]
    mean, sd = sum(per_seed) / 2, abs(per_seed[0] - per_seed[1]) / 2**0.5
    assert cells["gated x 0.5"][0] == f"{mean:.1f} ± {sd:.1f}"
    ids = {
        m: sum(values(rows, method=m, seed=s, wise=1.0)["test", "top1"] for s in (0, 1)) / 2
        for m in ("base", "lora", "gated")
    }
    assert cells["gated"][3] == f"{100 * (ids['gated'] - ids['base']) / (ids['lora'] - ids['base']):.0f} %"
    (tmp_path / "out" / "comparison.md").unlink()
    capsys.readouterr()
    compare.main([*line, "--report"])
    assert table in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.md").read_text() == table
    (tmp_path / "published").mkdir()
    (tmp_path / "out" / "results.jsonl").rename(tmp_path / "published" / "results.jsonl")
    compare.main([*line, "--report", "--output_dir", str(tmp_path / "published")])
    assert (tmp_path / "published" / "comparison.md").read_text() == table


def test_comparison_by_hand():
    """Means, sample standard deviations, and the parts of LoRA's gain and loss."""
    numbers = {
        "base": ((0.2, 0.6), (0.2, 0.6)),
        "lora": ((0.8, 0.5), (0.6, 0.4)),
        "gated@0.1": ((0.7, 0.6), (0.5, 0.5)),
    }
    row = {"data": "x", "split": "", "metric": "top1", "n": 10}
    rows = [
        {**row, "method": method, "seed": seed, "role": role, "value": value}
        for method, seeds in numbers.items()
        for seed, pair in enumerate(seeds)
        for role, value in zip(("id", "retention"), pair, strict=True)
    ]
    rows += [{**row, "method": "lora", "seed": s, "role": "id", "metric": "ece", "value": 0.9} for s in (0, 1)]
    sizes = ((0, 100), (1, 400))
    rows += [
        {**row, "method": "lora", "seed": s, "role": "cost", "metric": "trainable_parameters", "value": v}
        for s, v in sizes
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.comparison(rows).splitlines()[2:]]
    assert cells == [
        ["base", "20.0 ± 0.0", "-", "60.0 ± 0.0", "-", "-", "-", "2"],
        ["lora", "70.0 ± 14.1", "-", "45.0 ± 7.1", "100 %", "100 %", "250", "2"],
        ["gated@0.1", "60.0 ± 14.1", "-", "55.0 ± 7.1", "80 %", "33 %", "-", "2"],
    ]
    without = [{**row, "value": 0.6} if row["role"] == "retention" else row for row in rows]
    assert [line.split("|")[6].strip() for line in tables.comparison(without).splitlines()[2:]] == ["-", "-", "-"]


def test_published_tables_are_those_of_their_results(tmp_path):
    page = (RECIPES / "README.md").read_text()
    folders = sorted(path.parent for path in (RECIPES / "results").glob("*/results.jsonl"))
    folders = [folder for folder in folders if not folder.name.startswith("benchmark_")]  # see test_benchmark.py
    assert folders
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
        table = compare.write_report(tmp_path / folder.name)
        assert table in page
        for name in ("comparison.md", "results.jsonl"):
            assert (tmp_path / folder.name / name).read_bytes() == (folder / name).read_bytes()
        assert (folder / "frontier.png").is_file()


# ---- the callback
def watched(count=16):
    images = Images(count)
    sets = [
        EvalSet(
            role, role, images, "all", images.labels, NAMES, bank=EvalSet(role, "bank", Images(), "", Images().labels)
        )
        for role in ("id", "ood", "retention")
    ]
    return ClassifierSuite(sets=sets, batch_size=8, k=3)


RUN = {"max_steps": 30, "save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}


def test_callback_reports_changes_against_the_base(tmp_path):
    family = FAMILIES["dinov2"]
    callback = RetentionCallback(watched())
    settings = {**RUN, "load_best_model_at_end": True, "metric_for_best_model": "id_kept"}
    trainer = make_trainer(
        family, tmp_path, callbacks=[callback, EarlyStoppingCallback(50)], eval_dataset=Images(), **settings
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_retention_delta" in entry]
    assert [entry["step"] for entry in logged] == [5, 10, 15, 20, 25, 30]
    base, suite = family["model"](), watched()
    before = {row["data"]: row["value"] for row in suite.measure(base) if row["metric"] == "knn_top1"}
    for entry in logged:
        for role in before:
            assert entry[f"eval_{role}_delta"] == pytest.approx(entry[f"eval_{role}"] - before[role])
            assert entry[f"eval_{role}/{role}/knn_top1"] == entry[f"eval_{role}"]
        lost = entry["eval_retention_delta"] < -0.01
        assert entry["eval_id_kept"] == (entry["eval_retention_delta"] if lost else entry["eval_id"])
    # Another evaluation of the same step sees weights that were changed in between.
    randomize(trainer.model)
    suite_now = {row["data"]: row["value"] for row in watched().measure(trainer.model) if row["metric"] == "knn_top1"}
    assert trainer.evaluate()["eval_retention"] == suite_now["retention"]
    after = [entry for entry in logged if entry["step"] >= 15]
    assert trainer.state.best_metric == max(entry["eval_id_kept"] for entry in after)
    assert all(p.requires_grad == ("lora_" in n) for n, p in trainer.model.named_parameters())


def test_callback_takes_no_random_numbers_and_resumes(tmp_path):
    """With dropout: a run that is watched, one that is not, and one that is resumed end with the same weights."""
    family = FAMILIES["dinov2"]

    def run(name, resume=None, **more):
        model = family["model"]()
        config = lora_config(model, lora_dropout=0.3)
        trainer = make_trainer(family, tmp_path / name, get_peft_model(model, config), **RUN | more)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(tmp_path / name / "end")
        return load_file(tmp_path / name / "end" / "adapter_model.safetensors")

    plain = run("plain", eval_dataset=Images())
    for step in (10, 20):
        seen = run("seen", eval_dataset=Images(), callbacks=[RetentionCallback(watched(), max_samples=7)])
        again = run(
            "again",
            str(tmp_path / "seen" / f"checkpoint-{step}"),
            eval_dataset=Images(),
            callbacks=[RetentionCallback(watched(), max_samples=7)],
        )
        for found in (seen, again):
            assert found.keys() == plain.keys()
            assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize("trained", [None, True])
def test_a_random_head_is_not_a_base(trained, tmp_path):
    """Unless it is said to be trained; and a resumed run keeps the base's rows that its checkpoint holds."""
    family = FAMILIES["dinov2"]

    def run(folder, resume=None, seed=0):
        base = family["model"]()
        torch.manual_seed(seed)
        torch.nn.init.normal_(base.classifier.weight)  # drawn by each process for itself
        model = get_peft_model(base, lora_config(base, modules_to_save=["classifier"]))
        callback = RetentionCallback(watched(), trained_head=trained)
        trainer = make_trainer(family, folder, model, callbacks=[callback], eval_dataset=Images(), **RUN)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, read_results(folder / "results.jsonl")

    trainer, rows = run(tmp_path / "whole")
    base = [(row["role"], row["metric"]) for row in rows if row["method"] == "base"]
    assert ("retention", "knn_top1") in base
    assert (("id", "top1") in base) == bool(trained)
    assert any("eval_id/id/top1" in entry for entry in trainer.state.log_history)
    assert any("eval_id/id/top1_delta" in entry for entry in trainer.state.log_history) == bool(trained)
    _, resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-20"), seed=1)
    values = [[row["value"] for row in found if row["method"] == "base"] for found in (rows, resumed)]
    assert values[0] == values[1]


def test_banks_are_checked_when_a_suite_is_made():
    images = Images(8)
    for bank, found in (
        (EvalSet("retention", "bank", images, labels=images.labels), "8 images"),
        (EvalSet("retention", "bank", images, captions=["a"] * 8), "no labels"),
    ):
        data = EvalSet("retention", "old", images, labels=images.labels, class_names=NAMES, bank=bank)
        with pytest.raises(ValueError, match=f"'old' has {found}, and 20 labelled neighbours vote"):
            ClassifierSuite(sets=[data])


def test_what_is_not_measured_cannot_choose_a_model(tmp_path):
    sets = [data for data in watched().sets if data.role == "id"]
    callback = RetentionCallback(ClassifierSuite(sets=sets, k=3))
    with pytest.raises(ValueError, match="'id_kept' needs retention sets, and the suite of RetentionCallback has none"):
        make_trainer(FAMILIES["dinov2"], tmp_path, callbacks=[callback], metric_for_best_model="id_kept")


def test_all_closed_keeps_everything():
    family, suite = FAMILIES["dinov2"], watched()
    model = get_peft_model(family["model"](), lora_config(family["model"]()))
    gates = attach_gates(model, GateConfig(target_active=0.0))
    randomize(model)
    gates.set_scores(torch.zeros(len(gates.names)))
    features = backbone_features(family["model"](), Images(8), 3)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(backbone_features(model, Images(8), 3), features, strict=True))
        assert suite.measure(model) == suite.measure(family["model"]())
        gates.freeze()


def test_callback_leaves_what_is_frozen(tmp_path):
    model = get_peft_model(FAMILIES["dinov2"]["model"](), lora_config(FAMILIES["dinov2"]["model"]()))
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    RetentionCallback(watched())._measure(model)
    assert not frozen.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 12 - 1


def test_samples_are_bounded_and_the_same():
    suite = watched().sample(5)
    for data in suite.sets:
        assert (len(data), len(data.labels), len(data.bank)) == (5, 5, 5)
    assert [d.images.indices for d in suite.sets] == [d.images.indices for d in watched().sample(5).sets]
    assert len(watched().sample(100).sets[0]) == 16


def test_callback_errors():
    with pytest.raises(ValueError, match="max_samples=0"):
        RetentionCallback(watched(), max_samples=0)
    with pytest.raises(ValueError, match="max_loss=5 is a fraction"):
        RetentionCallback(watched(), max_loss=5)
    with pytest.raises(TypeError, match="needs a PeftModel, found Dinov2ForImageClassification"):
        RetentionCallback(watched())._measure(FAMILIES["dinov2"]["model"]())
    with pytest.raises(ValueError, match="role='old' is not known"):
        EvalSet("old", "x", Images(), labels=Images().labels)
    with pytest.raises(ValueError, match=r"id set 'x' \(mine:test\) has neither labels nor captions"):
        EvalSet("id", "x", Images(), "mine:test")
