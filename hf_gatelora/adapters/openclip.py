"""OpenCLIP models as transformers' `CLIPModel` and back: same weights, other names. Neither side has a converter."""

from dataclasses import fields
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.image_utils import PILImageResampling

from ..gates.lora_layers import base_layer

START, END = "<|startoftext|>", "<|endoftext|>"

# The settings that `CLIPConfig` has too, and those without an effect of their own. A model that sets another one cannot
# be a `CLIPModel`.
_CARRIED = {
    "model": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"},
    "vision_cfg": {
        *("width", "layers", "mlp_ratio", "norm_kwargs", "head_width", "patch_size", "image_size"),
        *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
        *("attn_pooler_queries", "attn_pooler_heads"),
    },
    "text_cfg": {
        *("width", "layers", "mlp_ratio", "norm_kwargs", "heads", "context_length", "vocab_size"),
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "tokenizer_mode", "pad_id", "eos_id"),
    },
}
_MEANING = {
    "multimodal_cfg": "a text decoder (CoCa)",
    "init_logit_bias": "a bias on the logits (SigLIP)",
    "timm_model_name": "a timm image tower",
    "hf_model_name": "a Hugging Face text tower",
    "hf_tokenizer_name": "another tokenizer than CLIP's",
    "attentional_pool": "attentional pooling",
    "ls_init_value": "layer scale",
    "patch_dropout": "patch dropout",
}

_TRANSPOSED = ("visual.proj", "text_projection")
_MODEL_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}
_NORM_NAMES = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load_open_clip(name: str, pretrained: str | None = None) -> tuple[CLIPModel, CLIPProcessor]:
    """Load an OpenCLIP model as a `CLIPModel` in fp32 with its processor.

    Features and token ids are those of open_clip (within 1e-4), except for the padding ids after the end of the text,
    which the causal mask hides. transformers' preprocessing differs in two steps. Texts: open_clip repairs them with
    ftfy and HTML unescaping (curly quotes, `&amp;`). Images: if the resized image is 3, 7, 11 ... pixels longer than
    the crop, the crop is one pixel away from open_clip's. Otherwise pixel values are equal with the processor that is
    returned; one that `CLIPProcessor.from_pretrained` reads from disk resizes with torchvision, unless it gets
    `backend="pil"`, and differs by up to 2/255 (before normalising).

    Args:
        name: open_clip's name of an architecture, `hf-hub:user/repo` or `local-dir:folder`.
        pretrained: open_clip's tag of the weights, or a checkpoint file; default: random weights, or those that the
            repo or the folder holds.

    Raises:
        ImportError: if open_clip is not installed.
        ValueError: if open_clip does not know the name or the tag, or `CLIPModel` or its processor does not have such
            an architecture or preprocessing.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"Loading {name!r} needs open_clip: install it with hf_gatelora[open_clip].") from error

    located = name.startswith(("hf-hub:", "local-dir:"))
    name = name if located else name.replace("/", "-")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip has no architecture {name!r}: use one of open_clip.list_models() or hf-hub:REPO.")
    if located and pretrained:
        raise ValueError(f"{name!r} brings its own weights: leave out pretrained={pretrained!r}.")
    clip_config = _clip_config(config, name)

    weights_of_tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if pretrained and not weights_of_tag and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"{pretrained!r} is neither a file nor a tag of {name!r}: it has {', '.join(tags) or 'none'}.")
    if weights_of_tag and weights_of_tag.get("quick_gelu", False) != config.get("quick_gelu", False):
        # open_clip only warns, and the features are wrong.
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise ValueError(
            f"The weights {pretrained!r} belong to another activation than that of {name!r}: use {other!r}."
        )
    model = open_clip.create_model(name, pretrained, require_pretrained=bool(pretrained or located))
    processor = _processor(model.visual.preprocess_cfg, clip_config, name)

    state, names = model.state_dict(), _names(clip_config)
    if unknown := sorted(set(state) ^ set(names)):
        raise ValueError(f"open_clip's {name!r} has other weights than a CLIPModel: {', '.join(unknown)}.")
    weights: dict[str, Tensor] = {}
    for key, parts in names.items():
        tensor = state[key].T if key in _TRANSPOSED else state[key]
        weights.update(zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else [tensor]))
    clip = CLIPModel(clip_config).eval()
    clip.load_state_dict(weights)
    return clip, processor


def export_open_clip(clip_model: CLIPModel) -> dict[str, Tensor]:
    """The state dict of open_clip for a `CLIPModel`, in the dtype and on the device of the model.

    `open_clip.create_model(name).load_state_dict` takes it, and `open_clip.create_model(name, file)` takes a file with
    it. It does not hold the activation: for a model with quick-GELU `name` ends in `-quickgelu`.

    Args:
        clip_model: tuned and merged.

    Raises:
        TypeError: if it is not a `CLIPModel`.
        ValueError: if an adapter is not merged.
    """
    if isinstance(clip_model, PeftModel) or any(base_layer(m) is not m for m in clip_model.modules()):
        raise ValueError("The model has an adapter that is not merged: export what model.merge_and_unload() returns.")
    if not isinstance(clip_model, CLIPModel):
        raise TypeError(f"Only a CLIPModel can be exported to open_clip, found {type(clip_model).__name__}.")
    state, exported = clip_model.state_dict(), {}
    for key, parts in _names(clip_model.config).items():
        tensor = torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[parts[0]]
        exported[key] = tensor.T.contiguous() if key in _TRANSPOSED else tensor
    return exported


def _names(config: CLIPConfig) -> dict[str, list[str]]:
    """Names of `CLIPModel`'s weights by their name in open_clip: three for its fused projection of q, k and v."""
    names = {key: [part] for key, part in _MODEL_NAMES.items()}
    modules = dict(_NORM_NAMES)
    for ours, theirs, tower in (
        ("vision_model", "visual.", config.vision_config),
        ("text_model", "", config.text_config),
    ):
        for i in range(tower.num_hidden_layers):
            layer, block = f"{ours}.encoder.layers.{i}", f"{theirs}transformer.resblocks.{i}"
            modules |= {f"{block}.{key}": f"{layer}.{part}" for key, part in _LAYER_NAMES.items()}
            for kind in ("weight", "bias"):
                names[f"{block}.attn.in_proj_{kind}"] = [f"{layer}.self_attn.{p}_proj.{kind}" for p in "qkv"]
    for key, part in modules.items():
        names |= {f"{key}.{kind}": [f"{part}.{kind}"] for kind in ("weight", "bias")}
    return names


def _clip_config(config: dict, name: str) -> CLIPConfig:
    """The configuration of the `CLIPModel` that is an open_clip model.

    Raises:
        ValueError: if no `CLIPModel` is.
    """
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    found = [
        _described(key, key, value)
        for key, value in config.items()
        if key not in _CARRIED["model"] and value is not None and value is not False
    ]
    for part, defaults in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        others = {field.name: field.default for field in fields(defaults) if field.name not in _CARRIED[part]}
        for key, default in others.items():
            value = config[part].get(key, default)
            if value != default and value not in ("", {}):
                found.append(_described(key, f"{part}.{key}", value))
        if extra := set(config[part].get("norm_kwargs") or {}) - {"eps"}:
            found.append(f"other options of the layer norms ({part}.norm_kwargs: {', '.join(sorted(extra))})")

    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    if isinstance(vision.layers, list | tuple):
        found.append(f"a ResNet image tower (vision_cfg.layers={vision.layers})")
    for key in ("image_size", "patch_size"):
        value = getattr(vision, key)
        if isinstance(value, list | tuple) and len(set(value)) > 1:
            found.append(f"images or patches that are not square (vision_cfg.{key}={value})")
    if found:
        raise ValueError(
            f"open_clip's {name!r} is not a model that transformers' CLIPModel can hold: it has {', '.join(found)}. "
            "Use an architecture of plain ViT and CLIP text tower, such as ViT-B-32, or a checkpoint of this model in "
            "transformers' own format where there is one."
        )

    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    vocabulary, _ = _vocabulary()
    if text.vocab_size < len(vocabulary):
        raise ValueError(
            f"open_clip's {name!r} embeds {text.vocab_size} tokens, and its tokenizer has {len(vocabulary)}: "
            f"its text_cfg.vocab_size has to be {len(vocabulary)} or more."
        )
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config={
            **_tower(vision, vision.width // vision.head_width, activation),
            "image_size": _side(vision.image_size),
            "patch_size": _side(vision.patch_size),
            "projection_dim": config["embed_dim"],
        },
        text_config={
            **_tower(text, text.heads, activation),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "projection_dim": config["embed_dim"],
            # open_clip pools at the largest id, which is the one of the end.
            "bos_token_id": vocabulary[START],
            "eos_token_id": vocabulary[END],
            "pad_token_id": vocabulary[END],
        },
    )


def _described(key: str, path: str, value) -> str:
    return f"{_MEANING[key]} ({path})" if key in _MEANING else f"{path}={value!r}"


def _tower(cfg, heads: int, activation: str) -> dict:
    """The settings that both towers have."""
    return {
        "hidden_size": cfg.width,
        "intermediate_size": int(cfg.width * cfg.mlp_ratio),
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "layer_norm_eps": (cfg.norm_kwargs or {}).get("eps", 1e-5),
    }


def _side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and merges, of the vocabulary in the open_clip package, with start and end as in transformers."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    renamed = {tokenizer.sot_token_id: START, tokenizer.eot_token_id: END}
    return {renamed.get(i, token): i for token, i in tokenizer.encoder.items()}, list(tokenizer.bpe_ranks)


def _processor(cfg: dict, config: CLIPConfig, name: str) -> CLIPProcessor:
    """The processor that preprocesses as open_clip does.

    Raises:
        ValueError: if images are resized to their longest edge.
    """
    if cfg["resize_mode"] not in ("shortest", "squash"):
        raise ValueError(
            f"open_clip's {name!r} resizes images in the mode {cfg['resize_mode']!r}, which CLIPImageProcessor does "
            "not have: use weights with 'shortest' or 'squash'."
        )
    side, squash = config.vision_config.image_size, cfg["resize_mode"] == "squash"
    mean, std = (v if isinstance(v, list | tuple) else [v] * 3 for v in (cfg["mean"], cfg["std"]))
    square = {"height": side, "width": side}
    bilinear = cfg["interpolation"] == "bilinear"
    images = CLIPImageProcessorPil(
        size=square if squash else {"shortest_edge": side},
        crop_size=square,
        resample=PILImageResampling.BILINEAR if bilinear else PILImageResampling.BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
    )
    vocabulary, merges = _vocabulary()
    tokenizer = CLIPTokenizer(
        vocabulary,
        merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=config.text_config.max_position_embeddings,
    )
    return CLIPProcessor(images, tokenizer)
