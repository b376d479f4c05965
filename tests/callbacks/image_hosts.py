"""A tiny GRPO trainer of a model that sees, whose prompts hold images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from tests.callbacks.hosts import arguments, make_tokenizer

IMAGE = "<image>"
SIZE = 14
_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{IMAGE} "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)
MESSAGES = List(
    {
        "role": Value("string"),
        "content": List({"type": Value("string"), "text": Value("string"), "image": Image()}),
    }
)


def picture(seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return Pictures.fromarray(
        torch.randint(0, 256, (SIZE, SIZE, 3), generator=g, dtype=torch.uint8).numpy()
    )


def make_processor() -> LlavaProcessor:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(IMAGE, special=True)]})
    pictures = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return LlavaProcessor(
        pictures, tokenizer, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_TEMPLATE, image_token=IMAGE,
    )  # fmt: skip


def make_seeing_model() -> Any:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = LlamaConfig(
        vocab_size=65, num_hidden_layers=2, max_position_embeddings=64, pad_token_id=0, **sizes
    )
    vision = CLIPVisionConfig(
        image_size=SIZE, patch_size=7, num_hidden_layers=2, projection_dim=32, **sizes
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=64)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # so that an image changes what is said
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20.0)
    return model


def messages(number: int, images: bool = True) -> list[dict[str, Any]]:
    seen = [{"type": "image", "text": None, "image": picture(number)}] if images else []
    words = {"type": "text", "text": f"w{number + 2} w{number + 3}", "image": None}
    return [{"role": "user", "content": [*seen, words]}]


def make_dataset(where: str, count: int = 4) -> Dataset:
    """Return problems with an image in their ``"messages"``, in a column ``"image"``, or none."""
    if where == "messages":
        rows = [{"prompt": messages(i), "number": i} for i in range(count)]
        features = Features({"prompt": MESSAGES, "number": Value("int64")})
        return Dataset.from_list(rows, features=features)
    plain = [[{"role": "user", "content": f"w{i + 2} w{i + 3}"}] for i in range(count)]
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(plain)]
    if where == "image":
        rows = [{**row, "image": picture(i)} for i, row in enumerate(rows)]
    return Dataset.from_list(rows)


def parity(completions: list[Any], **_: Any) -> list[float]:
    """Score sampled completions: an odd number of words is right."""
    return [float(len(answer[0]["content"].split()) % 2) for answer in completions]


def make_seeing_trainer(folder: Path | str, where: str, **changes: Any) -> GRPOTrainer:
    values = {
        "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 5,
        "beta": 0.0, "bf16": False, "gradient_checkpointing": False, "shuffle_dataset": False,
        **changes,
    }  # fmt: skip
    return GRPOTrainer(
        make_seeing_model(),
        reward_funcs=parity,
        args=GRPOConfig(**arguments(folder, **values)),
        train_dataset=make_dataset(where),
        processing_class=make_processor(),
    )
