"""Easy-VQA split by question type, as inputs of VLMo: words of a small vocabulary, pictures at their own size."""

import re
from dataclasses import dataclass

import torch
from easy_vqa_data import Split, easy_vqa
from torch import Tensor

from mope_fast import VLMoProcessor
from mope_fast.data import load_image

SIZE = 48
LONGEST = 12
"""Maximum number of tokens, including [CLS] and [SEP]."""
TYPES = {
    "what-color": "what color is the circle? what color is the shape?",
    "what-shape": "what shape is in the image? what shape is present?",
    "what-is": "what is the color of the circle? what is the red shape?",
}
"""Question types answered by a name. Yes-or-no questions are left out, because they need longer training from scratch."""


def type_of(question: str) -> str | None:
    """Return the question's type, one of TYPES, or None."""
    name = "-".join(_words(question)[:2])
    return name if name in TYPES else None


def _words(question: str) -> list[str]:
    return re.findall("[a-z]+", question.lower())


@dataclass(frozen=True)
class Questions:
    """Some questions of a split; ``labels[i]`` indexes ``names``."""

    input_ids: Tensor
    attention_mask: Tensor
    images: Tensor
    """(n,), rows of ``pictures``."""
    pictures: Tensor
    """(images, 3, SIZE, SIZE), of the whole split."""
    labels: Tensor
    names: list[str]
    kinds: Tensor
    """(n,), type and answer as one number."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Return a model's keyword arguments for these samples, on the data's device."""
        index = index.to(self.labels.device)
        text = {"input_ids": self.input_ids[index], "attention_mask": self.attention_mask[index]}
        return {**text, "pixel_values": self.pictures[self.images[index]], "labels": self.labels[index]}


def load(held_out: str, device: str) -> tuple[Questions, Questions, Questions, int]:
    """Load training questions of the other types, training and test questions of the held-out type, and the vocabulary size."""
    from transformers import BertTokenizer

    *splits, answers = easy_vqa()
    words = sorted({word for question in splits[0].questions for word in _words(question)})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *words])}
    processor = VLMoProcessor(BertTokenizer(vocab=vocabulary), image_size=SIZE, max_text_length=LONGEST)
    pictures = [_pictures(split, processor).to(device) for split in splits]
    others = [name for name in TYPES if name != held_out]
    parts = ((0, others), (0, [held_out]), (1, [held_out]))
    pretrain, train, test = (_questions(splits[i], pictures[i], processor, types, answers, device) for i, types in parts)
    return pretrain, train, test, len(vocabulary)


def _pictures(split: Split, processor: VLMoProcessor) -> Tensor:
    chunks = [split.paths[start : start + 500] for start in range(0, len(split.paths), 500)]
    return torch.cat([processor(images=[load_image(path) for path in chunk])["pixel_values"] for chunk in chunks])


def _questions(
    split: Split, pictures: Tensor, processor: VLMoProcessor, types: list[str], answers: list[str], device: str
) -> Questions:
    kept = [i for i, question in enumerate(split.questions) if type_of(question) in types]
    questions = [split.questions[i] for i in kept]
    text = processor(questions)
    found = split.answers[kept]
    names = [answers[i] for i in sorted(set(found.tolist()))]
    labels = torch.tensor([names.index(answers[i]) for i in found.tolist()])
    kinds = torch.tensor([types.index(type_of(question)) for question in questions]) * len(names) + labels
    rows = (text["input_ids"], text["attention_mask"], split.images[kept])
    ids, mask, images = (tensor.to(device) for tensor in rows)
    return Questions(ids, mask, images, pictures, labels.to(device), names, kinds)
