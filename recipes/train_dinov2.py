"""Fine-tune a DINOv2 or another vision backbone with gated LoRA, and measure what it gained and what it kept.

    accelerate launch recipes/train_dinov2.py recipes/configs/quickstart_dinov2.yaml --learning_rate 1e-3

Any `AutoModelForImageClassification` works that has one head beside its backbone. The head for the new classes is first
fitted on the frozen features and then trained along with the blocks (LP-FT, arXiv 2202.10054). ID and OOD sets are
measured by that head; retention sets by the head that the base model was published with, where it has their classes,
and by k-NN where a bank of labelled images is given.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from common import RecipeArguments, parse_arguments
from data import TOY, LabelledImages
from methods import Task, main
from peft import LoraConfig
from toy_backbone import ensure_backbone
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, logging
from transformers.integrations import unset_hf_deepspeed_config

from hf_gatelora import GatedLoraTrainingArguments
from hf_gatelora.evaluation.backbone import backbone_features, classification_head
from hf_gatelora.evaluation.linear_probe import fit_linear_probe
from hf_gatelora.evaluation.suite import ClassifierSuite
from hf_gatelora.layer import check_targets


@dataclass
class ClassifierArguments(RecipeArguments):
    """Model, data and task. A source is `toy:SET`, a file, a folder or a Hub id, with an optional `:split`."""

    bank: list[str] = field(
        default=None,
        metadata={"help": "name=source of the labelled images whose neighbours vote in k-NN on the retention set NAME"},
    )
    head_label_map: str = field(
        default=None,
        metadata={"help": "JSON file {class of the retention sets, by name or number: output of the published head}"},
    )
    image_size: int = field(default=None, metadata={"help": "side in pixels; default: as the model was published"})
    probe_first: bool = field(
        default=True, metadata={"help": "fit the head on frozen features before the training (LP-FT)"}
    )
    knn_k: int = field(default=20, metadata={"help": "neighbours that vote"})
    knn_temperature: float = field(default=0.07, metadata={"help": "temperature of their weights"})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        metadata={"help": "names of the modules that get a LoRA block"},
    )


class Classifier(Task):
    """An image classifier: a published backbone with a new head for the classes of the training images."""

    def __init__(self, arguments: ClassifierArguments):
        self.arguments = arguments
        self.name = str(ensure_backbone()) if arguments.model == TOY else arguments.model
        self.processor = AutoImageProcessor.from_pretrained(self.name)
        if arguments.image_size is not None:
            side = arguments.image_size
            square, size = {"height": side, "width": side}, dict(self.processor.size)
            self.processor.size = {"shortest_edge": side} if "shortest_edge" in size else square
            if getattr(self.processor, "crop_size", None) is not None:
                self.processor.crop_size = square
        self.class_names: list[str] = []
        self.probe: dict[str, torch.Tensor] | None = None

    def prepare(self, data: LabelledImages) -> None:
        if data.labels is None:
            raise ValueError(f"{data.source}: classification needs a column {self.arguments.label_column!r}.")
        self.class_names = data.class_names
        if self.arguments.probe_first:
            self.probe = self.fit_probe(data)

    def base(self) -> PreTrainedModel:
        model = self.load(num_labels=len(self.class_names), ignore_mismatched_sizes=True)
        model.config.id2label = dict(enumerate(self.class_names))
        model.config.label2id = {name: i for i, name in enumerate(self.class_names)}
        if self.probe is not None:
            classification_head(model)[1].load_state_dict(self.probe)
        return model

    def load(self, **settings) -> PreTrainedModel:
        """The published model, whole on each process."""
        unset_hf_deepspeed_config()
        with quiet():  # about the new head
            return AutoModelForImageClassification.from_pretrained(self.name, dtype=torch.float32, **settings)

    def fit_probe(self, data: LabelledImages) -> dict[str, torch.Tensor]:
        """Weights of a head fitted on the frozen features."""
        model = self.base().to(PartialState().device)
        name, head = classification_head(model)
        if not isinstance(head, torch.nn.Linear):
            raise ValueError(
                f"The head {name} of {type(model).__name__} is a {type(head).__name__}, not one linear layer: a probe "
                "cannot be put there. Train it along from its initial weights with --probe_first false."
            )
        features = backbone_features(model, data, 64, "linear probe").head_input
        weight, bias = fit_linear_probe(features, data.labels, len(self.class_names))
        return {"weight": weight, "bias": bias}

    def pixels(self, image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def lora_config(self, model, r, alpha):
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=self.arguments.lora_dropout,
            target_modules=self.arguments.lora_targets,
            modules_to_save=[classification_head(model)[0]],
        )
        check_targets(model, config)
        return config

    def suite(self, sets, batch_size):
        published = AutoConfig.from_pretrained(self.name)
        head, classes = None, {}
        if any(name.endswith("ForImageClassification") for name in published.architectures or []):
            head = classification_head(self.load())[1]
            for data in sets:
                if data.role == "retention":
                    found = self.head_classes(data.class_names, published.id2label)
                    if found is not None:
                        classes[data.name] = found
        for data in sets:
            if data.role == "retention" and data.bank is None and data.name not in classes:
                raise ValueError(
                    f"Retention set {data.name!r} cannot be measured: the published head does not have its classes "
                    f"({', '.join(data.class_names[:3])}, ...), and there is no bank for k-NN. Give --bank "
                    f"{data.name}=SOURCE with labelled images, or --head_label_map FILE."
                )
        k, temperature = self.arguments.knn_k, self.arguments.knn_temperature
        return ClassifierSuite(sets, batch_size, head, classes, k, temperature)

    def head_classes(self, names: list[str], id2label: dict[int, str]) -> torch.Tensor | None:
        """For each class its output of the published head; None where the head does not have them all."""
        if self.arguments.head_label_map is not None:
            mapping = json.loads(Path(self.arguments.head_label_map).read_text())
            places = [mapping.get(name, mapping.get(str(i))) for i, name in enumerate(names)]
        else:
            places_by_name = {label.lower().replace("_", " "): i for i, label in id2label.items()}
            places = [places_by_name.get(name.lower().replace("_", " ")) for name in names]
        return None if None in places else torch.tensor(places)

    def trainer_parts(self, data):
        def collate(rows):
            return {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels")}

        return {"data_collator": collate}

    def linear_probe(self, data, suite):
        model = self.base()
        classification_head(model)[1].load_state_dict(self.probe or self.fit_probe(data))
        return model, suite


@contextmanager
def quiet():
    """Within this context transformers reports errors only."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


if __name__ == "__main__":
    main(Classifier, *parse_arguments([ClassifierArguments, GatedLoraTrainingArguments], sys.argv[1:]))
