"""Fine-tune a DINOv2 or another vision backbone with gated LoRA, and measure what it gained and what it kept.

    accelerate launch recipes/train_dinov2.py recipes/configs/quickstart_dinov2.yaml --learning_rate 1e-3

Any `AutoModelForImageClassification` works that has one head beside its backbone. The head for the new classes is first
fitted on the frozen features and then trained along with the blocks (LP-FT, arXiv 2202.10054). ID and OOD sets are
measured by that head; retention sets by the head that the base model was published with, where it has their classes,
and by k-NN where a bank of labelled images is given.
"""

import sys
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from common import TOY, RecipeArguments, missing_column, parse_arguments
from methods import Task, main
from peft import LoraConfig
from toy_backbone import ensure_backbone
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from hf_gatelora import GatedLoraTrainingArguments
from hf_gatelora.adapters.bases import load_config, load_reporting, refuse_random
from hf_gatelora.evaluation.backbone import backbone_features, split_classifier
from hf_gatelora.evaluation.images import LabelledImages, parse_named_sources
from hf_gatelora.evaluation.linear_probe import fit_linear_probe
from hf_gatelora.evaluation.published import classifier_suite
from hf_gatelora.gates.lora_layers import check_targets


@dataclass
class ClassifierArguments(RecipeArguments):
    """Model, data and task. A source is `toy:SET`, a file, a folder or a Hub id, with an optional `:split`."""

    bank: list[str] = field(
        default=None,
        metadata={
            "help": "name=source of labelled images whose neighbours vote in k-NN on the retention set of that name",
            "action": "extend",
        },
    )
    head_label_map: list[str] = field(
        default=None,
        metadata={
            "help": "name=JSON file {class of that retention set, by name or number: output of the published head}",
            "action": "extend",
        },
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
        load_config(self.name)  # says more clearly what is wrong with a model that cannot be found
        self.processor = AutoImageProcessor.from_pretrained(self.name)
        if arguments.image_size is not None:
            side = arguments.image_size
            square, size = {"height": side, "width": side}, dict(self.processor.size)
            self.processor.size = {"shortest_edge": side} if "shortest_edge" in size else square
            if getattr(self.processor, "crop_size", None) is not None:
                self.processor.crop_size = square
        self.class_names: list[str] = []
        self.head: dict[str, torch.Tensor] | None = None  # weights of the new one, as it starts

    def prepare(self, data: LabelledImages) -> None:
        if data.labels is None:
            raise missing_column(data, "classification", "label_column", self.arguments.label_column)
        self.class_names = data.class_names
        model = self.base()
        if self.arguments.probe_first:
            self.head = self.fit_probe(data, model)
        else:  # the same one for every model of the run
            self.head = split_classifier(model)[2].state_dict()

    def base(self) -> PreTrainedModel:
        model = self.load(num_labels=len(self.class_names), ignore_mismatched_sizes=True)
        model.config.id2label = dict(enumerate(self.class_names))
        model.config.label2id = {name: i for i, name in enumerate(self.class_names)}
        if self.head is not None:
            split_classifier(model)[2].load_state_dict(self.head)
        return model

    def load(self, **settings) -> PreTrainedModel:
        """The published model, whole on each process, with a new head where `settings` ask for another size.

        Raises:
            ValueError: where weights of its backbone are missing.
        """
        unset_hf_deepspeed_config()
        model, random = load_reporting(AutoModelForImageClassification, self.name, **settings)
        head = split_classifier(model)[1]
        refuse_random(self.name, model, {key for key in random if not key.startswith(f"{head}.")})
        return model

    def fit_probe(self, data: LabelledImages, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Weights of a head fitted on the frozen features."""
        _, name, head = split_classifier(model)
        if not isinstance(head, torch.nn.Linear):
            raise ValueError(
                f"The head {name} of {type(model).__name__} is a {type(head).__name__}, not one linear layer: a probe "
                "cannot be put there. Train it along from its initial weights with --probe_first false."
            )
        features = backbone_features(model.to(PartialState().device), data, 64, "linear probe").head_input
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
            modules_to_save=[split_classifier(model)[1]],
        )
        check_targets(model, config)
        return config

    def suite(self, sets, batch_size):
        maps = parse_named_sources("head_label_map", self.arguments.head_label_map)
        config, head = AutoConfig.from_pretrained(self.name), None
        if any(name.endswith("ForImageClassification") for name in config.architectures or []):
            head = split_classifier(self.load())[2]
        knn = {"k": self.arguments.knn_k, "temperature": self.arguments.knn_temperature}
        return classifier_suite(sets, head, config.id2label, maps, batch_size=batch_size, **knn)

    def trainer_parts(self, data):
        def collate(rows):
            return {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels")}

        return {"data_collator": collate}

    def linear_probe(self, data, suite):
        model = self.base()
        if not self.arguments.probe_first:
            split_classifier(model)[2].load_state_dict(self.fit_probe(data, model))
        return model, suite


if __name__ == "__main__":
    main(Classifier, *parse_arguments([ClassifierArguments, GatedLoraTrainingArguments], sys.argv[1:]))
