"""Prompt templates and class names for zero-shot classification."""

import logging

logger = logging.getLogger(__name__)

SIMPLE = [
    "a photo of a {}",
    "a photo of the {}",
    "a picture of one {}",
    "a photo of several {}",
    "a close-up of a {}",
    "a blurred photo of a {}",
    "a drawing of a {}",
    "a {} in its surroundings",
]
NAMED = ("simple", "openai")


def prompt_templates(name: str) -> list[str]:
    """Prompt templates with a `{}` for the class name.

    Args:
        name: `"simple"`, 8 templates of this package; or `"openai"`, the 80 that CLIP used on ImageNet, as open_clip
            has them. Without open_clip it gives the simple ones too, and logs a warning.

    Raises:
        ValueError: if the name is another one.
    """
    if name == "simple":
        return list(SIMPLE)
    if name != "openai":
        raise ValueError(f"templates {name!r} are not known: use 'simple' or 'openai'.")
    try:
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    except ImportError as error:
        logger.warning(
            "The 'openai' templates come with open_clip, which cannot be imported (%s): the %d 'simple' ones are used "
            "instead, and accuracies are not comparable with CLIP's. To get them: pip install open_clip_torch",
            error,
            len(SIMPLE),
        )
        return list(SIMPLE)
    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def imagenet_class_names() -> list[str]:
    """Names of the 1000 ImageNet-1k classes, in the order of their indices, as open_clip has them.

    Raises:
        ImportError: if open_clip is not installed.
    """
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError as error:
        raise ImportError("The ImageNet class names come with open_clip: pip install open_clip_torch.") from error
    return list(IMAGENET_CLASSNAMES)
