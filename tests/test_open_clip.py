"""OpenCLIP: weights, texts and images are the same on both sides, there and back; what does not map is refused."""

import json
import sys
from dataclasses import asdict

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from models import lora_config, tiny_clip
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor
from world import parse, words

from hf_gatelora import attach_gates, export_open_clip, load_open_clip
from hf_gatelora.training.openclip import open_clip_checkpoint

# isort: split
import compare
import train_clip

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.5},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TEXTS = [
    "a photo of a cat",
    "Wow!  It's 3 o'clock,\n isn't it?!",
    "a naïve café ÉCOLE, 日本語 😀",
    "x" * 60,
    "",
    "many words " * 20,
]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture
def architecture(tmp_path, monkeypatch):
    """`architecture(config)`: registers a configuration with open_clip for the test; returns its name."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))

    def register(config: dict, name: str = "tiny") -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        return name

    return register


def changed(**settings) -> dict:
    """The tiny configuration with other settings; `vision` and `text` are merged into those of the towers."""
    towers = {f"{tower}_cfg": {**TINY[f"{tower}_cfg"], **settings.pop(tower, {})} for tower in ("vision", "text")}
    return {**TINY, **towers, **settings}


def perturb(model: torch.nn.Module) -> None:
    """No parameter as it was initialised: biases of 0 and norms of 1 would hide what is mixed up."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def difference(model, clip: CLIPModel, processor, name: str) -> float:
    """Largest difference between the features of open_clip and transformers, and between their logit scales."""
    model.eval()
    pixels = torch.randn(2, 3, *model.visual.image_size, generator=torch.Generator().manual_seed(2))
    ids, encoded = open_clip.get_tokenizer(name)(TEXTS), processor.tokenizer(TEXTS, padding=True, truncation=True)
    encoded = {key: torch.tensor(value) for key, value in encoded.items()}
    images, texts = model.encode_image(pixels), model.encode_text(ids)
    assert min(images.std(), texts.std()) > 0.1
    pairs = [(images, clip.get_image_features(pixels).pooler_output), (model.logit_scale, clip.logit_scale)]
    # With the mask, without it, and with the padding of open_clip.
    for inputs in (encoded, {"input_ids": encoded["input_ids"]}, {"input_ids": ids}):
        pairs.append((texts, clip.get_text_features(**inputs).pooler_output))
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        changed(quick_gelu=True, vision={"norm_kwargs": {"eps": 0.1}}, text={"norm_kwargs": {"eps": 0.2}}),
        changed(vision={"image_size": [16, 16], "timm_pool": ""}, text={"vocab_size": 49500, "hf_tokenizer_name": ""}),
    ],
    ids=["gelu", "quickgelu_eps", "lists"],
)
def test_there_and_back(config, architecture, tmp_path):
    name = architecture(config)
    model = open_clip.create_model(name)
    perturb(model)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    clip, processor = load_open_clip(name, str(tmp_path / "weights.safetensors"))
    assert not clip.training
    assert difference(model, clip, processor, name) < 1e-4
    exported = export_open_clip(clip)
    assert all(torch.equal(exported[key], value) for key, value in model.state_dict().items())

    perturb(clip)
    assert difference(model, clip, processor, name) > 1e-2
    model.load_state_dict(export_open_clip(clip))
    assert difference(model, clip, processor, name) < 1e-4


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14"])
def test_shapes(name, architecture):
    config = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = 1  # they are all alike
    name = architecture(config, f"{name}-short")
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    torch.manual_seed(0)
    clip, processor = load_open_clip(name)
    assert difference(model, clip, processor, name) < 1e-4
    perturb(clip)
    model.load_state_dict(export_open_clip(clip))
    assert difference(model, clip, processor, name) < 1e-4


def test_token_ids(architecture):
    name = architecture(TINY)
    _, processor = load_open_clip(name)
    ids, encoded = (
        open_clip.get_tokenizer(name)(TEXTS),
        processor.tokenizer(TEXTS, padding="max_length", truncation=True),
    )
    for expected, found, mask in zip(ids, encoded["input_ids"], encoded["attention_mask"]):
        end = expected.argmax() + 1
        assert sum(mask) == end
        assert found[:end] == expected[:end].tolist()


def repo(folder, preprocess: dict | None = None):
    """Write a tiny model as open_clip's repos hold it; returns it."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess or {}}))
    model = open_clip.CLIP(**TINY)
    perturb(model)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    "preprocess",
    [{}, {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash"}, {"mean": 0.5, "std": 0.5}],
    ids=["default", "squash", "scalars"],
)
def test_images(preprocess, tmp_path):
    repo(tmp_path / "repo", preprocess)
    name = f"local-dir:{tmp_path / 'repo'}"
    transform = open_clip.create_model_and_transforms(name)[2]
    _, processor = load_open_clip(name)
    processor.save_pretrained(tmp_path / "saved")
    saved = CLIPProcessor.from_pretrained(tmp_path / "saved")
    for image in (picture(16, 16), picture(61, 40), picture(30, 64), picture(10, 13), picture(90, 16)):
        expected = transform(image)
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
        pixels = saved(images=image, return_tensors="pt")["pixel_values"][0]
        assert (pixels - expected).abs().max() < 2.1 / 255 / min(saved.image_processor.image_std)
    if not preprocess:  # the crop that is one pixel away, as the docstring says
        image = picture(19, 16)
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels[:, :, 1:], transform(image)[:, :, :-1], rtol=0, atol=1e-5)


def test_hub_repo(tmp_path, monkeypatch):
    cached = tmp_path / "models--user--clip"
    model = repo(cached / "snapshots" / "abc", {"mean": MEAN, "std": STD})
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    clip, processor = load_open_clip("hf-hub:user/clip")
    assert torch.equal(clip.logit_scale, model.logit_scale)
    assert processor.image_processor.image_mean == tuple(MEAN)
    (cached / "snapshots" / "abc" / "open_clip_model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="pretrained weights"):  # not random ones
        load_open_clip("hf-hub:user/clip")
    with pytest.raises(ValueError, match="brings its own weights: leave out pretrained='x'"):
        load_open_clip("hf-hub:user/clip", "x")


REFUSED = {
    "resnet": ("RN50", r"ResNet image tower \(vision_cfg.layers=\[3, 4, 6, 3\]\).*Use an architecture of plain ViT"),
    "coca": ("coca_ViT-B-32", r"a text decoder \(CoCa\).*attentional pooling.*text_cfg.embed_cls=True"),
    "siglip": ("ViT-B-16-SigLIP", r"a bias on the logits \(SigLIP\).*a timm image tower"),
    "roberta": ("roberta-ViT-B-32", "a Hugging Face text tower"),
    "clipa": ("ViT-L-14-CLIPA", r"no_ln_pre=True.*pool_type='avg'.*another tokenizer.*text_cfg.no_causal_mask=True"),
    "layer_scale": ("ViT-M-16-alt", r"layer scale \(vision_cfg.ls_init_value\)"),
    "zero_bias": (changed(init_logit_bias=0.0), r"a bias on the logits"),
    "custom_text": (changed(custom_text=True), "custom_text=True"),
    "patch_dropout": (changed(vision={"patch_dropout": 0.5}), "patch dropout"),
    "output_tokens": (changed(vision={"output_tokens": True}), "vision_cfg.output_tokens=True"),
    "block": (changed(vision={"qk_norm": True}), "vision_cfg.qk_norm=True"),
    "norm": (changed(text={"norm_kwargs": {"eps": 1e-6, "bias": False}}), r"text_cfg.norm_kwargs: bias"),
    "activation": (changed(text={"act_kwargs": {"approximate": "tanh"}}), r"text_cfg.act_kwargs=.*tanh"),
    "eos": (changed(text={"pool_type": "eos", "eos_id": 49407}), "text_cfg.pool_type='eos'"),
    "projection": (changed(text={"proj_bias": True}), "text_cfg.proj_bias=True"),
    "not_square": (changed(vision={"image_size": [16, 24]}), r"not square \(vision_cfg.image_size=\[16, 24\]\)"),
    "zero_scale": (changed(vision={"ls_init_value": 0.0}), "layer scale"),
    "vocabulary": (changed(text={"vocab_size": 100}), "embeds 100 tokens, and its tokenizer has 49408"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_architectures(case, architecture, monkeypatch):
    config, message = REFUSED[case]
    monkeypatch.setattr(open_clip, "create_model", None)  # the configuration says it, before anything is loaded
    with pytest.raises(ValueError, match=message):
        load_open_clip(config if isinstance(config, str) else architecture(config))


def test_refused_names(architecture, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no architecture 'ViT-Z-1': use one of open_clip.list_models\(\)"):
        load_open_clip("ViT-Z-1")
    with pytest.raises(ValueError, match=r"is neither a file nor a tag of 'ViT-B-32': it has openai, laion400m"):
        load_open_clip("ViT-B-32", "laion")
    with pytest.raises(ValueError, match="another activation than that of 'ViT-B-32': use 'ViT-B-32-quickgelu'"):
        load_open_clip("ViT-B-32", "openai")
    repo(tmp_path / "repo", {"resize_mode": "longest"})
    with pytest.raises(ValueError, match="in the mode 'longest'"):
        load_open_clip(f"local-dir:{tmp_path / 'repo'}")
    # What the configuration does not say, the weights do.
    name, model = architecture(TINY), open_clip.CLIP(**changed(vision={"no_ln_pre": True}))
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: model)
    open_clip.model.set_model_preprocess_cfg(model, asdict(open_clip.transform.PreprocessCfg()))
    with pytest.raises(ValueError, match=r"other weights than a CLIPModel: visual.ln_pre.bias, visual.ln_pre.weight"):
        load_open_clip(name)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"install it with hf_gatelora\[open_clip\]"):
        load_open_clip(name)


def test_only_merged_models_are_exported():
    clip = tiny_clip()
    model = get_peft_model(clip, lora_config(clip))
    attach_gates(model)
    for unmerged in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"not merged: export what model.merge_and_unload\(\)"):
            export_open_clip(unmerged)
    with pytest.raises(TypeError, match=r"Only a CLIPModel .* found CLIPVisionModel"):
        export_open_clip(tiny_clip().vision_model)
    export_open_clip(model.merge_and_unload())


def test_recipe(world, architecture, tmp_path, monkeypatch, capsys):
    name = architecture(TINY)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    model = open_clip.create_model(name)
    perturb(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    line = [*words(world, tmp_path / "out"), "--model", f"open_clip:{name}/{tmp_path / 'weights.pt'}"]
    line += ["--methods", "gated", "full", "--full_learning_rate", "1e-2", "--save_open_clip", "--seeds", "0"]
    compare.main(["clip", *line])
    (folder,) = (tmp_path / "home" / "hf_gatelora").iterdir()
    assert f"as a transformers checkpoint: {folder}" in capsys.readouterr().out

    folders = {method: tmp_path / "out" / "seed-0" / method / method for method in ("gated", "full")}
    config = PeftConfig.from_pretrained(folders["gated"])
    assert config.base_model_name_or_path == str(folder)
    base, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    assert difference(model, base, processor, name) < 1e-4
    gated = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), folders["gated"]).eval()
    full = CLIPModel.from_pretrained(folders["full"]).eval()
    for method, tuned in (("gated", gated.merge_and_unload()), ("full", full)):
        back = open_clip.create_model(name, str(folders[method] / "open_clip_model.safetensors"))
        assert difference(back, tuned, processor, name) < 1e-4
        assert difference(back, base, processor, name) > 1e-2
    assert not list(tmp_path.rglob("*.tmp"))


def test_recipe_with_random_weights(world, architecture, tmp_path, monkeypatch):
    name = architecture(TINY)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    state = torch.random.get_rng_state()
    folder = open_clip_checkpoint(name)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert open_clip_checkpoint(name) == folder  # a second start finds the same weights
    line = [*words(world, tmp_path / "out"), "--model", f"open_clip:{name}"]
    base, _, parts = train_clip.prepare(*parse("clip", line))
    assert base() is not base()
    assert all(torch.equal(a, b) for a, b in zip(base().parameters(), base().parameters()))
    transform = open_clip.create_model_and_transforms(name)[2]
    found = parts["train_dataset"].transform(picture(61, 40))
    torch.testing.assert_close(found, transform(picture(61, 40)), rtol=0, atol=1e-5)
    assert open_clip_checkpoint(architecture(changed(quick_gelu=True))) != folder
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    )
