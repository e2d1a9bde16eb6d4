"""The released API, for scripts written against LLaMA2-Accessory: `SPHINXModel` with its names, defaults and answers.

    from sphinx_fast.infer.accessory import SPHINXModel  # was: from SPHINX import SPHINXModel

Greedy answers in fp32 are those of the released code. Sampled ones follow the same distribution and cannot be the same
texts: there `torch.multinomial` draws from the global generator of a device, here each answer draws one number per
token from a generator of its own, so a seed gives the same answer alone, in a batch and on any device.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphinx_fast.infer.batch import Batch
from sphinx_fast.infer.loading import is_released, load_released, parse_dtype
from sphinx_fast.infer.request import Answer, Picture, Request
from sphinx_fast.infer.sampling import Sampling
from sphinx_fast.infer.sphinx import Sphinx
from sphinx_fast.model.conversation import STOP, conversation_prompt
from sphinx_fast.weights.accessory import open_released
from sphinx_fast.weights.foreign import read_json

# What a llama_type is called here. On a converted folder it chooses the views, as it does on a released one.
PRESET_OF = {
    "llama_ens": "sphinx",
    "llama_ens5": "sphinx-1k",
    "llama_ens10": "sphinx-2k",
    "llama_ens_light": "sphinx-tiny",
    "llama_ens5_light": "sphinx-tiny-1k",
}


class SPHINXModel:
    """A loaded model with the methods of the released class. See `from_pretrained`.

    Attributes:
        sphinx: the same model with everything else that can be asked of it: streams, batches, chats, the picture cache.
        with_visual: whether it takes pictures.
    """

    def __init__(self, sphinx: Sphinx, with_visual: bool = True) -> None:
        self.sphinx, self.with_visual = sphinx, with_visual
        self._last: Request | None = None  # keys and values of the conversation so far stay while we refer to it
        if not with_visual:
            for encoders in ("vision_tower", "fusion"):
                setattr(sphinx.model.model, encoders, None)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_path: str | Path | Sequence[str | Path],
        llama_type: str | None = None,
        llama_config: str | Path | Sequence[str | Path] | None = None,
        tokenizer_path: str | Path | None = None,
        with_visual: bool = False,
        max_seq_len: int = 4096,
        mp_group: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cuda",
        quant: bool = False,
    ) -> SPHINXModel:
        """Load a released folder, of any number of shards, or one that `sphinx-fast convert` wrote.

        A released folder goes straight to the device, weight by weight; nothing is written to disk.

        Args:
            pretrained_path: folder. Of several released ones, settings are the last one's, and so is every weight that
                the last one holds: a whole checkpoint, then one of what was trained since.
            llama_type: which variant; from meta.json by default.
            llama_config: JSON file of the language model's arguments in place of the folder's config.json; of several,
                later ones override.
            tokenizer_path: SentencePiece file in place of the folder's tokenizer.model.
            with_visual: whether to take pictures. Without, the encoders are let go of once they were read.
            max_seq_len: positions of prompt and answer, visual ones included; at most those of a converted folder's
                own configuration.
            mp_group: one process reads all shards, so nothing but None or a group of one.
            dtype: of weights and arithmetic.
            device: where to compute.
            quant: NF4 for the language model's linear layers, by bitsandbytes, on a CUDA GPU.

        Raises:
            ValueError: a folder, file or argument cannot be used; there is no such device; the weights are more than
                it has.
        """
        folders = [pretrained_path] if isinstance(pretrained_path, (str, Path)) else list(pretrained_path or ())
        if not folders:
            raise ValueError("pretrained_path: expected a folder or several, got none")
        if llama_type is not None and llama_type not in PRESET_OF:
            raise ValueError(f"llama_type: expected one of {', '.join(PRESET_OF)}, got {llama_type!r}")
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len: expected at least 1, got {max_seq_len}")
        if mp_group is not None and mp_group.size() > 1:
            # Loading all the same would put as many whole models on the GPUs as the script starts processes.
            raise ValueError(
                f"mp_group: a group of {mp_group.size()} processes, but one process reads all shards and answers; "
                "start one and leave mp_group out"
            )
        where: dict[str, Any] = {"device": device, "dtype": parse_dtype(str(dtype).removeprefix("torch."))}
        where["quantize"] = "nf4" if quant else None
        if len(folders) > 1 or is_released(folders[0]):
            args = None if llama_config is None else _merged(llama_config)
            loaded = load_released(
                open_released(folders, llama_type, args=args, tokenizer_path=tokenizer_path), **where
            )
            sphinx, most = Sphinx(loaded.model, loaded.processor), max_seq_len
            sphinx.quantization = loaded.quantization
        else:
            for name, value in (("llama_config", llama_config), ("tokenizer_path", tokenizer_path)):
                if value is not None:
                    raise ValueError(f"{name}: {folders[0]} is no released folder and comes with its own; leave it out")
            sphinx = Sphinx.from_pretrained(folders[0], variant=PRESET_OF[llama_type] if llama_type else None, **where)
            most = min(max_seq_len, sphinx.model.config.text_config.max_position_embeddings)
        sphinx.model.config.text_config.max_position_embeddings = most
        return cls(sphinx, with_visual)

    def generate_response(
        self,
        qas: Sequence[Sequence[str | None]],
        image: Any,
        max_gen_len: int = 512,
        temperature: float = 0.1,
        top_p: float = 0.5,
        seed: int = 0,
    ) -> str:
        """The answer to the last question of a conversation about one picture.

        A picture seen before is neither encoded nor read again, and of a conversation that goes on from the last call
        only what is new is computed.

        Args:
            qas: [[question, answer], ..., [question, None]].
            image: PIL picture, or any other form that `Sphinx.ask` takes; None: a conversation without a picture.
            max_gen_len: at most this many tokens.
            temperature: 0 takes the most probable token.
            top_p: sample from the smallest set of tokens whose probability reaches this.
            seed: of the sampling; the global generators are left alone.

        Raises:
            ValueError: qas are no conversation, the picture cannot be read, or they leave no room for an answer.
        """
        prompt = conversation_prompt(_turns(qas))
        settings = _settings(max_gen_len, temperature, top_p, operator.index(seed), (STOP,))
        engine = self.sphinx.engine
        request = engine.request(prompt, self._see(image), settings, self._last)
        list(engine.serve([request]))
        answer = request.answer().text
        self._last = request
        return answer

    def generate(
        self,
        prompts: Sequence[str],
        images: Tensor | Sequence[Any] | None = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
    ) -> list[str]:
        """What follows each of several texts, which are taken as they are: no conversation is written around them.

        Any number of prompts may be given; as many as fit are answered at once. Sampling is seeded from torch's global
        generator, so `torch.manual_seed` repeats it.

        Args:
            prompts: texts.
            images: None; or one for each prompt: float tensor [prompts, 3, S, S] of pictures that were padded, resized
                and normalised already, S being the variant's picture size; or a list of such [3, S, S], of PIL
                pictures or any other form that `Sphinx.ask` takes, and of None.
            max_gen_len: at most this many tokens each.
            temperature: 0 takes the most probable token.
            top_p: sample from the smallest set of tokens whose probability reaches this.
            additional_stop_symbols: texts that end an answer, besides EOS, and are not part of it.

        Raises:
            ValueError: an argument is out of range, or a prompt cannot be answered: the message names its index.
        """
        for name, texts in (("prompts", prompts), ("additional_stop_symbols", additional_stop_symbols)):
            if isinstance(texts, str):
                raise ValueError(f"{name}: expected a list of texts, got one text")
        pictures = _one_each(images, len(prompts))
        stop = tuple(additional_stop_symbols)
        # Drawn only to sample, as there: a greedy call leaves the global generator where it was.
        seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist() if temperature else [0] * len(prompts)
        each = [_settings(max_gen_len, temperature, top_p, seed, stop) for seed in seeds]
        calls = (partial(self._asked, *one) for one in zip(prompts, pictures, each, strict=True))
        found = Batch(self.sphinx.engine, calls, "prompt").answers()
        return [answer.text for answer in found if isinstance(answer, Answer)]

    def _asked(self, prompt: str, image: Any, settings: Sampling) -> Request:
        if not isinstance(prompt, str):
            raise ValueError(f"expected a text, got {type(prompt).__name__}")
        return self.sphinx.engine.request(prompt, self._see(image), settings)

    def _see(self, image: Any) -> Picture | None:
        if image is not None and not self.with_visual:
            raise ValueError(
                "image: this model was loaded without its encoders; from_pretrained(..., with_visual=True)"
            )
        if isinstance(image, Tensor) and image.is_floating_point():
            return self.sphinx.engine.see_square(image)
        return self.sphinx.engine.see(image)


def _merged(files: str | Path | Sequence[str | Path]) -> dict[str, Any]:
    """The arguments in one or several JSON files."""
    args: dict[str, Any] = {}
    for file in [files] if isinstance(files, (str, Path)) else files:
        args |= read_json(Path(file))
    return args


def _turns(qas: Sequence[Sequence[str | None]]) -> list[tuple[str, str | None]]:
    """Pairs as turns; that the last answer is None and no other is `conversation_prompt` checks."""
    turns: list[tuple[str, str | None]] = []
    for pair in qas:
        question, answer = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        if not isinstance(question, str) or not (answer is None or isinstance(answer, str)):
            raise ValueError(f"qas: expected [[question, answer], ..., [question, None]], got {pair!r} among them")
        turns.append((question, answer))
    return turns


def _settings(max_gen_len: int, temperature: float, top_p: float, seed: int, stop: tuple[str, ...]) -> Sampling:
    if max_gen_len < 1:
        raise ValueError(f"max_gen_len: expected at least 1, got {max_gen_len}")
    return Sampling(max_gen_len, temperature, top_p, seed=seed, stop=stop)


def _one_each(images: Tensor | Sequence[Any] | None, count: int) -> list[Any]:
    """A picture or None for each of `count` prompts."""
    if images is None:
        return [None] * count
    if not isinstance(images, (list, tuple, Tensor)) or (isinstance(images, Tensor) and images.dim() != 4):
        what = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: expected a tensor [prompts, 3, S, S] or a list of pictures, got {what}")
    if len(images) != count:
        raise ValueError(f"images: expected one for each of {count} prompts, got {len(images)}")
    return list(images)
