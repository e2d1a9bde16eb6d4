"""Pictures and text -> model inputs: visual placeholders stand where the visual tokens will be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from sphinx_fast.model.config import SphinxConfig
from sphinx_fast.model.conversation import CHAT_TEMPLATE
from sphinx_fast.model.image_processor import SphinxImageProcessor, flatten_pictures
from sphinx_fast.model.tokenizer import IMAGE_TOKEN


class SphinxProcessor(ProcessorMixin):
    """An image processor and a tokenizer.

    Args:
        image_processor: `SphinxImageProcessor`.
        tokenizer: any tokenizer; one that knows `<image>` uses that id, otherwise `image_token_id` is needed.
        tokens_per_view: positions of one view in the language model (291 in the released checkpoints).
        image_token_id: id of one visual position, `SphinxConfig.image_token_id`.
    """

    def __init__(
        self,
        image_processor: SphinxImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        tokens_per_view: int = 291,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_view = tokens_per_view
        self.image_token = IMAGE_TOKEN
        if image_token_id is None and tokenizer is not None:
            image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.image_token_id = image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def from_config(cls, config: SphinxConfig, tokenizer: Any) -> SphinxProcessor:
        """The processor that fits a model's configuration."""
        vision = config.vision_config
        return cls(
            SphinxImageProcessor(picture_size=vision.picture_size, view_size=vision.view_size),
            tokenizer,
            tokens_per_view=vision.tokens_per_view,
            image_token_id=config.image_token_id,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        return_mm_token_type_ids: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pictures and prompts -> `input_ids`, `attention_mask`, `pixel_values`, `num_image_patches`.

        Each `<image>` in a text takes the next picture. A text that names none gets its picture right after BOS: with
        one picture per text, or with `images` as a list per text (an empty list or None: a row without a picture).

        Raises:
            ValueError: pictures and `<image>` marks do not add up, or rows of different length without padding.
        """
        if images is None and text is None:
            raise ValueError("give images, text or both")
        data: dict[str, Any] = {}
        pictures = flatten_pictures(images)
        views: list[int] = []
        if pictures:
            data.update(self.image_processor(pictures, return_tensors="pt"))
            views = data["num_image_patches"].tolist()
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            counts = self._pictures_per_text(images, texts, len(pictures))
            ends = list(itertools.accumulate(counts))
            rows = [
                self.prompt_ids(row, views[end - count : end], add_special_tokens=add_special_tokens)
                for row, count, end in zip(texts, counts, ends, strict=True)
            ]
            if kwargs.get("truncation") and kwargs.get("max_length"):
                rows = [self._truncate(row, kwargs["max_length"]) for row in rows]
            encoded = self.tokenizer.pad(
                {"input_ids": rows},
                padding=padding,
                max_length=kwargs.get("max_length"),
                padding_side=kwargs.get("padding_side"),
                return_attention_mask=True,
            )
            data.update(encoded)
            if return_mm_token_type_ids:
                data["mm_token_type_ids"] = [
                    [int(token == self.image_token_id) for token in row] for row in data["input_ids"]
                ]
        if return_tensors is not None and "input_ids" in data and len({len(row) for row in data["input_ids"]}) > 1:
            raise ValueError("texts of different length: pass padding=True to make one batch of them")
        return BatchFeature(data, tensor_type=return_tensors)

    def _pictures_per_text(self, images: Any, texts: list[str], total: int) -> list[int]:
        """How many pictures each text takes."""
        marks = [text.count(IMAGE_TOKEN) for text in texts]
        nested = isinstance(images, (list, tuple)) and any(
            entry is None or isinstance(entry, (list, tuple)) for entry in images
        )
        if nested:
            if len(images) != len(texts):
                raise ValueError(f"images: {len(images)} lists of pictures for {len(texts)} texts")
            counts = [len(flatten_pictures(entry)) for entry in images]
            for index, (count, mark) in enumerate(zip(counts, marks, strict=True)):
                if mark not in (0, count):
                    raise ValueError(f"text {index} names {mark} pictures and was given {count}")
            return counts
        if sum(marks) == total:
            return marks
        if not any(marks) and total == len(texts):
            return [1] * total
        if not any(marks) and len(texts) == 1:
            return [total]
        raise ValueError(
            f"{total} pictures for {len(texts)} texts that name {sum(marks)}; give one picture per text, a list of "
            f"pictures per text, or name each with {IMAGE_TOKEN}"
        )

    def prompt_ids(self, text: str, views: Sequence[int] = (), *, add_special_tokens: bool = True) -> list[int]:
        """BOS, then the text with every picture's placeholders in place (in front where the text names none).

        `views` counts the views of each picture.
        """
        segments, count = text.split(IMAGE_TOKEN), len(views)
        if len(segments) == 1:
            segments = [""] * count + segments
        elif len(segments) - 1 != count:
            raise ValueError(f"the text names {len(segments) - 1} pictures with {IMAGE_TOKEN} and was given {count}")
        bos = self.tokenizer.bos_token_id
        ids = [bos] if add_special_tokens and bos is not None else []
        for index, segment in enumerate(segments):
            if index:
                ids += [self.image_token_id] * (views[index - 1] * self.tokens_per_view)
            if segment:
                ids += self.tokenizer(segment, add_special_tokens=False)["input_ids"]
        return ids

    def _truncate(self, row: list[int], max_length: int) -> list[int]:
        if self.image_token_id in row[max_length:]:
            raise ValueError(f"max_length {max_length} would cut through the visual tokens of a picture")
        return row[:max_length]

    def replace_image_token(self, image_inputs: dict | None = None, image_idx: int = 0, **kwargs: Any) -> str:
        """The text of one picture's placeholders (serving engines ask)."""
        counts = (image_inputs or {}).get("num_image_patches")
        views = self.image_processor.num_views if counts is None else int(counts[image_idx])
        return IMAGE_TOKEN * (views * self.tokens_per_view)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        """Placeholders and views of pictures of the given (height, width) sizes."""
        from transformers.processing_utils import MultiModalData

        if image_sizes is None:
            return MultiModalData()
        views = [self.image_processor.get_number_of_image_patches(*size) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[count * self.tokens_per_view for count in views], num_image_patches=views
        )

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Generated ids -> texts, by SentencePiece's rule, placeholders left out."""
        rows = generated_outputs.tolist() if isinstance(generated_outputs, torch.Tensor) else generated_outputs
        kept = [[token for token in row if token != self.image_token_id] for row in rows]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=skip_special_tokens)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "num_image_patches"]
