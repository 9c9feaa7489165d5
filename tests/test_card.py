"""The model card: its numbers as in the results file, its code as readers run it, its metadata as the Hub reads it."""

import json
import re
import time

import numpy as np
import pytest
import yaml
from conftest import make_trainer
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from models import FAMILIES, Images, lora_config
from peft import get_peft_model
from PIL import Image
from transformers import TrainerCallback
from world import NAMES, TASKS, run, words

from hf_gatelora import GateConfig, RetentionCallback, attach_gates
from hf_gatelora.adapters.export import scale_adapter
from hf_gatelora.card import plots, tables
from hf_gatelora.card.write import is_generated, refresh_card, write_card
from hf_gatelora.evaluation.suite import ClassifierSuite, EvalSet
from hf_gatelora.records import RESULTS_FILE, read_results, without_paths, write_results

DINO = FAMILIES["dinov2"]
COMMIT = "a" * 40


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def published(world, tmp_path_factory):
    """Folders of adapters that the recipes wrote, by task: gated ones with a scale between, and a plain LoRA."""
    found = {}
    for task in TASKS:
        output = tmp_path_factory.mktemp("published") / task
        line = [*words(world, output, task), "--wise", "0.5", "--methods", "lora", "gated"]
        line += ["--ood", f"saved={world / 'saved'}", f"folder={world / 'data.parquet'}"]
        line += ["--retention", f"old={world / 'saved'}"]
        run(task, line)
        found[task] = output / "gated"
    return found


@pytest.mark.parametrize("task", TASKS)
def test_the_card_tells_what_the_results_file_holds(published, world, task):
    folder = published[task]
    rows = [row for row in read_results(folder / RESULTS_FILE) if "wise" not in row]
    own = {(row["role"], row["data"], row["metric"]): row for row in rows if row["method"] == "gated"}
    base = {(row["role"], row["data"], row["metric"]): row for row in rows if row["method"] == "base"}
    card = card_of(folder)

    measured = [row for row in own.values() if row["role"] != "cost"]
    found = card.data.eval_results
    assert [result.metric_value for result in found] == [row["value"] for row in measured]
    assert [result.dataset_name.split(" (")[0] for result in found] == [row["data"] for row in measured]
    name, again = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert (name, again) == (f"{'model' if task == 'clip' else 'dinov2'}-gated-lora", found)
    assert card.text.strip().startswith(f"# {name}\n")

    for key in (("id", "test", "top1"), ("ood", "saved", "top1"), ("retention", "old", "top1")):
        before, now = base[key]["value"], own[key]["value"]
        line = rf"\| {key[1]} +\| accuracy +\| +{100 * before:.1f} % \| +{100 * now:.1f} % \| +"
        assert re.search(line + re.escape(f"{100 * (now - before):+.1f}") + rf" \| +{own[key]['n']} \|", card.text)
    pair = [own["ood", name, "top1"]["value"] for name in ("saved", "folder")]
    assert re.search(rf"\*\*mean\*\* \| accuracy +\| +[\d.]+ % \| +{50 * sum(pair):.1f} %", card.text)
    half = [row for row in read_results(folder / RESULTS_FILE) if row.get("wise") == 0.5 and row["role"] == "id"]
    assert re.search(rf"\| 0.5 +\| +{100 * half[0]['value']:.1f} %", card.text)

    summary = json.loads((folder / "gates.json").read_text())
    for block in summary["blocks"]:
        assert (f"`{block['name']}` ({block['score']:+.3f})" in card.text) == block["open"]
    assert f"{own['cost', 'train', 'trainable_parameters']['value']:,} |" in card.text
    assert f"({own['cost', 'train', 'adapter_bytes']['value']:,} bytes)" in card.text
    settings = re.findall(r"^\| `(\w+)` ", card.text.partition("| setting ")[2], re.M)
    # The main ones come first, defaults or not; what follows from others or says where it ran does not come.
    main = ["gate_target_active", "r", "lora_alpha", "learning_rate", "max_steps", "per_device_train_batch_size"]
    assert [name for name in settings if name != "seed"][: len(main)] == main
    assert not {
        "lora_r",
        "use_cpu",
        "accelerator_config",
        "output_dir",
        "label_names",
        "train",
        "gate_learning_rate",
    } & set(settings)
    assert f"Trained on {len(NAMES)} classes: {', '.join(NAMES)}." in card.text
    for picture in ("gate_map.png", "frontier.png"):
        assert picture in card.text
        Image.open(folder / picture).verify()
    text = (folder / "README.md").read_text()
    assert "[More Information Needed]" not in text
    assert not [line for line in text.splitlines() if str(world.parent) in line or "/tmp" in line]
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert "called" not in text.partition("## Limits")[2]  # the run names the base by a folder
    assert "was a local one" in text
    assert "No license is stated" in text


def test_the_code_of_the_card_runs(published, world, tmp_path, monkeypatch):
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    for task, base in {"clip": "model", "dinov2": "dinov2"}.items():
        code = "\n".join(re.findall(r"```python\n(.*?)```", card_of(published[task]).text, re.S))
        code = code.replace("path/to/the/base/model", str(world / base))
        code = code.replace("path/to/this/folder", str(published[task]))
        if task == "clip":
            assert 'hypothesis_template="a {} square"' in code
            assert f"candidate_labels={json.dumps(NAMES)}" in code
        scope = {}
        exec(code, scope)
        assert type(scope["merged"]).__name__ in ("CLIPModel", "Dinov2ForImageClassification")
        if task == "dinov2":
            assert sorted(scope["merged"].config.id2label.values()) == sorted(NAMES)
            assert {row["label"] for row in scope["pipe"]("image.jpg")} <= set(NAMES)


def test_a_plain_lora_has_a_card_too(published):
    card = card_of(published["clip"].parent / "lora")
    assert "with 18 LoRA blocks" in card.text
    assert "gate" not in card.text.replace("hf_gatelora", "").lower()


# ---- Trainer ----------------------------------------------------------------------------------------------------


def suite(**hub) -> ClassifierSuite:
    images = Images(16)
    sets = [EvalSet(role, role, images, "ada/shapes:test", images.labels, NAMES, **hub) for role in ("id", "ood")]
    return ClassifierSuite(sets=sets, batch_size=8)


def watched_trainer(folder, callback=None, **arguments):
    callback = callback or RetentionCallback(suite(dataset="ada/shapes", revision=COMMIT))
    evaluating = {"eval_strategy": "steps", "eval_steps": 4, "eval_dataset": Images(8), "callbacks": [callback]}
    return make_trainer(DINO, folder, **evaluating, **arguments)


def test_trainer_card_of_what_was_measured_in_training(tmp_path):
    trainer = watched_trainer(tmp_path, save_strategy="steps", save_steps=5, max_steps=12)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="mit", tags=["shapes"], finetuned_from="facebook/dinov2-small")
    rows = read_results(tmp_path / RESULTS_FILE)
    assert {(row["method"], row["role"], row.get("step")) for row in rows} == {
        *(("base", role, None) for role in ("id", "ood")),
        *(("gated", role, 12) for role in ("id", "ood")),
    }
    card = card_of(tmp_path)
    own = [row for row in rows if row["method"] == "gated"]
    assert [result.metric_value for result in card.data.eval_results] == [row["value"] for row in own]
    assert {result.dataset_revision for result in card.data.eval_results} == {COMMIT}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert "Measured at step" not in card.text
    assert re.search(r"\| retention \| +\| +\| not measured \| +not measured \|", card.text)
    assert "- Not measured: retention." in card.text
    assert "| `learning_rate`" in card.text
    assert (card.data.license, card.data.base_model) == ("mit", "facebook/dinov2-small")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert {"shapes", "base_model:adapter:facebook/dinov2-small"} <= set(card.data.tags)

    entries = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results/hf_gatelora.yaml").read_text()))
    top1 = [row["value"] for row in own if row["metric"] == "top1"]
    assert [(e.dataset_id, e.task_id, e.value, e.dataset_revision) for e in entries] == [
        ("ada/shapes", "test", value, COMMIT) for value in top1
    ]
    # Each checkpoint has what was measured last before it.
    for step, measured in ((5, 4), (10, 8)):
        folder = tmp_path / f"checkpoint-{step}"
        assert {row["step"] for row in read_results(folder / RESULTS_FILE) if row["method"] == "gated"} == {measured}
        text = card_of(folder).text
        assert f"Measured at step {measured}; the weights here are of step {step}." in text
        assert ("The gates are not frozen" in text) == (step == 5)
        assert ("step 5 of 12" in text) == (step == 5)

    # Written again, the card keeps what it was given; saved again, it says what is known then.
    write_card(tmp_path, repo_id="ada/shapes-lora")
    assert (card_of(tmp_path).data.license, card_of(tmp_path).data.base_model) == ("mit", "facebook/dinov2-small")
    assert card_of(tmp_path).data.model_name == "shapes-lora"
    assert card_of(tmp_path).data.tags == card.data.tags
    trainer.save_model()
    assert card_of(tmp_path).data.license is None


def test_the_best_model_has_its_own_results(tmp_path):
    class Falling(ClassifierSuite):
        def metrics(self, model, data, title):
            return {"top1": next(values)}

    values = iter([0.1, 0.1, 0.5, 0.5, 0.9, 0.9, 0.6, 0.6, 0.7, 0.7])  # of id and ood: at step 4, of the base, ...
    callback = RetentionCallback(Falling(sets=suite().sets))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_id", "greater_is_better": True}
    trainer = watched_trainer(tmp_path, callback, save_strategy="steps", save_steps=4, gate_freeze_ratio=0.3, **best)
    trainer.train()
    trainer.save_model()
    assert trainer.state.best_global_step == 8
    rows = [row for row in read_results(tmp_path / RESULTS_FILE) if row["method"] == "gated"]
    assert {(row["step"], row["value"]) for row in rows} == {(8, 0.9)}
    assert "Measured at step" not in card_of(tmp_path).text


def test_a_card_of_somebody_is_kept(tmp_path, caplog):
    trainer = make_trainer(DINO, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    path, generated = tmp_path / "README.md", (tmp_path / "README.md").read_text()
    assert is_generated(generated)
    for text in ("# Mine\n", generated.replace("## Limits", "## What to know"), "---\nlicense: mit\n---\nmine\n"):
        path.write_text(text)
        for write in (trainer.save_model, trainer.create_model_card, lambda: write_card(tmp_path)):
            caplog.clear()
            write()
            assert path.read_text() == text
            assert "was written or edited by hand" in caplog.text
    # Placeholders are nobody's.
    stock = get_peft_model(DINO["model"](), lora_config(DINO["model"]()))
    stock.save_pretrained(tmp_path / "stock")
    assert "[More Information Needed]" in (tmp_path / "stock" / "README.md").read_text()
    write_card(tmp_path / "stock")
    for text in ("", "---\nlicense: mit\n---\n", str(ModelCard.from_template(ModelCardData()))):
        path.write_text(text)
        trainer.save_model()
        assert is_generated(path.read_text())
        assert "## How to use it" in path.read_text()
    assert "## How to use it" in (tmp_path / "stock" / "README.md").read_text()


def test_warnings_of_the_card(tmp_path):
    model = get_peft_model(DINO["model"](), lora_config(DINO["model"]()))
    gates = attach_gates(model, GateConfig(target_active=None, lambda_=0.0))
    gates.save_folded(tmp_path / "open")
    text = re.sub(r"\s+", " ", card_of(tmp_path / "open").text)
    assert "The gates are not frozen" in text
    assert "Nothing was measured on this adapter and its base" in text
    gates.set_scores([0.0] * 12)
    gates.freeze()
    model.save_pretrained(tmp_path / "closed")
    text = card_of(tmp_path / "closed").text
    assert "All 12 gates ended closed" in text
    assert "0 of 12 are open at the end" in text
    assert "not frozen" not in text


def test_scaled_adapters_have_their_own_numbers(published, tmp_path):
    scale_adapter(published["clip"], 0.5, tmp_path)
    refresh_card(tmp_path)
    rows = [row for row in read_results(published["clip"] / RESULTS_FILE) if row.get("wise") == 0.5]
    card = card_of(tmp_path)
    assert [result.metric_value for result in card.data.eval_results] == [row["value"] for row in rows]
    assert "scaled by 0.5" in card.text
    scale_adapter(published["clip"], 0.25, tmp_path)
    refresh_card(tmp_path)
    assert "Nothing was measured" in card_of(tmp_path).text
    assert not (tmp_path / RESULTS_FILE).exists()


def test_unreadable_results_do_not_lose_an_adapter(tmp_path, caplog):
    trainer = make_trainer(DINO, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    for text, message in {
        "not json\n": "line 1: not a row of a results file",
        '{"loss": 1}\n': "'method' is missing",
    }.items():
        (tmp_path / RESULTS_FILE).write_text(text)
        caplog.clear()
        trainer.save_model()
        assert "The adapter is saved, but without a new model card" in caplog.text
        assert message in caplog.text
        with pytest.raises(ValueError, match=message):
            write_card(tmp_path)
        assert (tmp_path / RESULTS_FILE).read_text() == text
    row = {"role": "id", "data": "x", "split": "", "metric": "top1", "value": 0.5, "n": 1}
    write_results([{**row, "method": method} for method in ("lora", "gated")], tmp_path / RESULTS_FILE)
    with pytest.raises(ValueError, match=r"several methods \(gated, lora\)"):
        write_card(tmp_path)
    with pytest.raises(ValueError, match="holds no readable adapter"):
        write_card(tmp_path / "nothing")


def test_folders_of_this_machine_are_not_told():
    told = {
        "/home/ada/photos.parquet": "photos.parquet (local)",
        "photo=/home/ada/my photos/": "photo=my photos (local)",
        "~/data:test": "data:test (local)",
        "C:\\data\\x.parquet": "x.parquet (local)",
        "ada/photos:test": "ada/photos:test",
        "toy:sketch-test": "toy:sketch-test",
        "a photo of a {}": "a photo of a {}",
    }
    for value, expected in told.items():
        assert without_paths(value) == expected
    assert without_paths({"a": ["/x/y"], "b": 1}) == {"a": ["y (local)"], "b": 1}


def test_results_of_another_adapter_do_not_stay(tmp_path):
    """Neither those of an earlier run in the folder, nor those of the search where the gates froze after it."""
    trainer = watched_trainer(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert (tmp_path / RESULTS_FILE).is_file()
    trainer = make_trainer(DINO, tmp_path, max_steps=4)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / RESULTS_FILE).exists()
    assert "Nothing was measured" in (tmp_path / "README.md").read_text()
    trainer = watched_trainer(tmp_path / "stopped", max_steps=12)
    trainer.add_callback(Stop())
    trainer.train()
    trainer.save_model()
    assert trainer.gates.frozen
    assert "Nothing was measured" in (tmp_path / "stopped" / "README.md").read_text()


@pytest.fixture
def folder(tmp_path):
    """A gated adapter, and rows that somebody wrote beside it."""
    model = get_peft_model(DINO["model"](), lora_config(DINO["model"]()))
    gates = attach_gates(model, GateConfig(target_active=0.25))
    gates.freeze()
    gates.save_folded(tmp_path)
    return tmp_path


def rows_of(count, **fields):
    row = {"split": "", "metric": "top1", "n": 4, "role": "ood", **fields}
    return [
        {**row, "data": f"d{i}", "method": m, "value": 0.5, **fields} for i in range(count) for m in ("base", "gated")
    ]


def test_text_of_files_stays_text(folder):
    """Cells, code and links hold what the files say, and nothing that a page would run or lay out."""
    evil = "a | b\n<script>alert(1)</script> `c` [d](e) *f*"
    rows = rows_of(1, data=evil, split=evil, arguments={"prompt": evil, evil: evil}, versions={evil: evil}, model=evil)
    rows += rows_of(1, data="plain", arguments={"prompt": "a {}"})
    trained = {"role": "cost", "data": "train", "method": "gated", "classes": [evil, "x"]}
    write_results([*rows, {**rows[0], **trained}], folder / RESULTS_FILE)
    summary = json.loads((folder / "gates.json").read_text())
    summary["base_model"] = {"class": "X()\nimport os", "library": "transformers", "classes": None}
    (folder / "gates.json").write_text(json.dumps(summary))
    write_card(folder)
    body = card_of(folder).text
    assert "import os" not in body
    assert "measured with other prompts" in body
    for table in re.findall(r"(?:^\|.*\n)+", body, re.M):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "<script" not in re.sub(r"(`+) .*? \1(?!`)", "", body)  # outside of code
    line = next(line for line in body.splitlines() if line.startswith("| OOD"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert cells[1] == r"a \| b &lt;script>alert(1)&lt;/script> \`c\` \[d\](e) \*f\*"
    assert cells[2:] == ["accuracy", "50.0 %", "50.0 %", "+0.0", "4"]


def test_cards_are_bounded_and_linear(folder):
    write_results(rows_of(3000), folder / RESULTS_FILE)
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert len(text) < 60_000
    assert "*2,900 more*" in text
    assert re.search(r"\| OOD +\| \*\*mean\*\* +\| accuracy \| +50.0 % \|", text)

    def seconds(rows):
        start = time.process_time()
        tables.results_table(rows)
        return time.process_time() - start

    metrics = [{**row, "metric": row["data"], "data": "x"} for row in rows_of(8000)]
    assert seconds(metrics) < 24 * seconds(metrics[:2000]) + 0.05  # 8 times as many rows; squared they take 64 times


def test_gate_map_shows_the_cut(folder, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    summary = json.loads((folder / "gates.json").read_text())
    for i, block in enumerate(summary["blocks"]):
        block["score"] = 0.12 + 0.01 * i  # all above τ: the budget alone decides
        block["open"] = i >= 9
    summary["open"] = 3
    plots.gate_map(summary, "x.png")
    axis, bar = figures[0].axes
    assert "τ = 0.1" in figures[0].get_suptitle()
    assert [label.get_text() for label in bar.get_yticklabels()] == [
        "0.120",
        "0.200",
        "the budget's cut",
        "0.210",
        "0.230",
    ]
    shades = axis.images[0].get_array()
    order = [shades[divmod(i, 6)] for i in range(12)]
    assert order == sorted(order)
    assert order[8] < 0 < order[9]
    columns = [module.split(".")[-1] for block in summary["blocks"][:6] for module in block["modules"]]
    assert [label.get_text() for label in axis.get_xticklabels()] == columns  # in the model's order
    many = [{**summary["blocks"][0], "modules": [f"t.layers.{i}.{j}"]} for i in range(500) for j in "abcd"]
    plots.gate_map({**summary, "blocks": many}, "x.png")
    assert max(figures[1].get_size_inches()) <= 18
    assert len(figures[1].axes[0].get_yticks()) <= 40


def test_frontier_names_methods_and_scales(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    rows = [
        {
            "method": method,
            "role": role,
            "data": role,
            "metric": "top1",
            "value": value + 0.1 * seed,
            "seed": seed,
            **wise,
        }
        for method, value in (("base", 0.2), ("lora", 0.5), ("gated@0.05", 0.4), ("gated@0.1", 0.5))
        for wise in ({}, {"wise": 0.5})
        for seed in (0, 1)
        for role in ("id", "retention")
        if not (wise and method == "base")
    ]
    plots.frontier(rows, "x.png")
    axis = figures[0].axes[0]
    handles, names = axis.get_legend_handles_labels()
    assert names == ["base model", "LoRA", "gated LoRA, 5 % open", "gated LoRA, 10 % open"]
    colours = [handle.get_color() for handle in handles]
    assert (colours[2] == colours[3], len(set(colours))) == (True, 3)
    assert {text.get_text() for text in axis.texts} == {"0.5", "1"}
    assert list(handles[1].get_ydata()) == [pytest.approx(55.0)]
    bars = [bar.get_segments()[-1] for bar in axis.collections]
    assert any(segment[1][1] - segment[0][1] == pytest.approx(2 * 100 * 0.1 / 2**0.5) for segment in bars)
    assert axis.get_xlabel() == "retention accuracy (%)"


class Stop(TrainerCallback):
    """Ends a run at its fourth step, in the search."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def test_the_code_says_which_transformers_has_these_layers(published):
    """DINOv2's layers have their names since 5.18: before it, half of the adapter would load without a word."""
    lines = {name: (published[name] / "README.md").read_text().splitlines() for name in ("dinov2", "clip")}
    (imported,) = [line for line in lines["dinov2"] if line.startswith("from transformers import Dinov2")]
    code, _, comment = imported.partition("  # ")
    assert code == "from transformers import Dinov2ForImageClassification"
    assert comment == "5.18.0 or later: the names of its layers"
    assert "from transformers import CLIPModel" in lines["clip"]
