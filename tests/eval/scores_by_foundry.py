"""For a Python with torch, transformers, datasets, torchmetrics and pyyaml: `SOURCE MODEL TASKS.yaml LENGTH`.

Evaluates a Hugging Face folder by LLM Foundry's own classes, read from a checkout of it, and prints the scores as JSON.
What they import of Composer and of its own package is stood in for; its forward of a batch is here.
"""

import contextlib
import json
import os
import shutil
import sys
import types
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

source, model_folder, tasks_file, length = sys.argv[1:]


def module(name: str, **names: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(names)
    made.__path__ = []
    sys.modules[name] = made
    return made


def theirs(name: str, path: str) -> types.ModuleType:
    made = types.ModuleType(name)
    sys.modules[name] = made
    exec(compile((Path(source) / path).read_text(), path, "exec"), made.__dict__)
    return made


class Dist:
    """One process."""

    @staticmethod
    @contextlib.contextmanager
    def local_rank_zero_download_and_wait(path):
        yield

    @staticmethod
    def get_local_rank():
        return 0

    @staticmethod
    def all_gather_object(value):
        return [value]

    @staticmethod
    def get_sampler(dataset, drop_last, shuffle):
        return torch.utils.data.SequentialSampler(dataset)


class DataSpec:
    """The loader alone."""

    def __init__(self, dataloader, **functions):
        self.dataloader = dataloader


for name in ("composer", "llmfoundry", "llmfoundry.eval", "llmfoundry.eval.datasets", "llmfoundry.utils"):
    module(name)
module("composer.core", DataSpec=DataSpec)
module("composer.core.data_spec", _default_split_batch=None, _split_list=None)
module(
    "composer.utils",
    MissingConditionalImportError=Exception,
    dist=Dist,
    get_file=lambda uri, path, overwrite: shutil.copy(uri, path),
)
sys.modules["llmfoundry"].registry = module("llmfoundry.registry", icl_datasets={})
module(
    "llmfoundry.utils.registry_utils",
    construct_from_registry=lambda name, registry, kwargs, **_: registry[name](**kwargs),
)
theirs("llmfoundry.eval.datasets.utils", "llmfoundry/eval/datasets/utils.py")
datasets = theirs(
    "llmfoundry.eval.datasets.in_context_learning_evaluation",
    "llmfoundry/eval/datasets/in_context_learning_evaluation.py",
)
metrics = theirs("llmfoundry.eval.metrics.nlp", "llmfoundry/eval/metrics/nlp.py")
KINDS = {
    "multiple_choice": ("MultipleChoice", "InContextLearningMultipleChoiceAccuracy"),
    "schema": ("Schema", "InContextLearningMultipleChoiceAccuracy"),
    "language_modeling": ("LM", "InContextLearningLMAccuracy"),
    "generation_task_with_answers": ("GenerationTaskWithAnswers", "InContextLearningGenerationExactMatchAccuracy"),
}
for kind, (word, _) in KINDS.items():
    word += "" if word.endswith("Answers") else "Task"
    sys.modules["llmfoundry.registry"].icl_datasets[kind] = getattr(datasets, f"InContextLearning{word}Dataset")
NOT_OF_DATASETS = ("label", "metric_names", "icl_task_type", "batch_size", "has_categories", "dataset_uri")

tokenizer = AutoTokenizer.from_pretrained(model_folder)
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@torch.no_grad()
def answered(batch):
    """What the model says to a batch, and what was to be said."""
    if batch["mode"] == "generate":
        how = {key: value for key, value in batch["generation_kwargs"].items() if value is not None}
        written = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, **how)
        new = written[:, batch["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True), batch["labels"]
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, labels


scores = {}
for task in yaml.safe_load(Path(tasks_file).read_text())["icl_tasks"]:
    for n in task["num_fewshot"]:
        settings = {key: value for key, value in task.items() if key not in NOT_OF_DATASETS}
        settings |= {"num_fewshot": n, "pad_tok_id": tokenizer.eos_token_id}
        settings.setdefault("max_seq_len", int(length))
        if "question_prelimiter" in settings:
            settings["prelimiter"] = settings.pop("question_prelimiter")
        loaders = datasets.get_icl_task_dataloader(
            task["icl_task_type"],
            task["dataset_uri"],
            tokenizer,
            task.get("batch_size", 4),
            has_categories=task.get("has_categories", False),
            destination_path=os.path.join(os.getcwd(), f"{task['label']}-{n}.jsonl"),
            kwargs=settings,
        )
        for category, loader in (loaders if isinstance(loaders, dict) else {"": loaders}).items():
            names = task.get("metric_names") or [KINDS[task["icl_task_type"]][1]]
            found = {name: getattr(metrics, name)() for name in names}
            for batch in loader.dataloader:
                outputs, labels = answered(batch)
                for metric in found.values():
                    metric.update(batch, outputs, labels)
            label = "/".join(filter(None, ("metrics", task["label"], f"{n}-shot", category)))
            scores |= {f"{label}/{name}": float(metric.compute()) for name, metric in found.items()}
print(json.dumps(scores))
