"""Replies of a checkpoint that fits into memory whole, greedily decoded: for looking at models, not for serving them.

Shape suffixes: B = replies, T = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reapkit import layout as layouts
from reapkit.architectures import ARCHITECTURES
from reapkit.behaviour import Prompt, Reply, knows_calls_of, parse_calls, without_thinking
from reapkit.checkpoint import Checkpoint
from reapkit.errors import ResourceError, UnsupportedError
from reapkit.memory import free_memory
from reapkit.modules import StreamedModel, load_tokenizer
from reapkit.observation import Run
from reapkit.progress import Progress, silent

# Replies generated at once. More fill a device better and hold more of the cache.
REPLIES_PER_BATCH = {"cuda": 32, "cpu": 16}
# Share of the free memory that weights may take: the rest is for the cache and temporaries.
WEIGHTS_SHARE = 0.7


class LoadedModel:
    """A checkpoint whose replies can be asked for: weights decoded from whatever format they are in, and all in memory.

    Args:
        source: a folder or hub id.
        run: device and dtype.

    Raises:
        ResourceError: it does not fit.
    """

    def __init__(self, source: str | Path, run: Run, *, progress: Progress = silent) -> None:
        device, dtype = run.resolve()
        checkpoint = Checkpoint.open(source, progress=progress)
        layout = layouts.resolve(checkpoint, ARCHITECTURES)
        self._model = StreamedModel(
            checkpoint, layout, device=device, dtype=dtype, trust_remote_code=run.trust_remote_code
        )
        self._tokenizer: Any = load_tokenizer(checkpoint, trust_remote_code=run.trust_remote_code)
        if not self._tokenizer.chat_template:
            raise UnsupportedError(
                f"{checkpoint.origin} has no chat template, so it cannot be asked", hint="leave out --prompts"
            )
        self.origin = checkpoint.origin
        self._require_memory()

    def _require_memory(self) -> None:
        model = self._model
        needed = sum(p.numel() for p in model.module.parameters()) * torch.empty((), dtype=model.dtype).element_size()
        free = free_memory(model.device)
        if needed > WEIGHTS_SHARE * free:
            raise ResourceError(
                f"{self.origin} takes {needed / 1e9:,.2f} GB on {model.device} and {free / 1e9:,.2f} GB are free: it cannot reply here",
                hint="serve both models and name the servers: --endpoint URL --endpoint URL",
            )

    @property
    def knows_calls(self) -> bool:
        """Whether tool calls in this model's format can be read."""
        return knows_calls_of(str(self._tokenizer.get_chat_template()))

    def reply_all(self, prompts: Sequence[Prompt], max_tokens: int, progress: Progress) -> list[Reply]:
        """Load the weights, reply to every prompt, and free the weights: a `Replier`."""
        model, task = self._model, f"replies of {self.origin}"
        progress(task, 0, len(prompts), "prompts")
        texts = [self._rendered(prompt) for prompt in prompts]
        ids = [self._tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        # Prompts of about one length share a batch.
        order = sorted(range(len(prompts)), key=lambda number: len(ids[number]))
        replies: dict[int, Reply] = {}
        try:
            self._load()
            size = REPLIES_PER_BATCH[model.device.type]
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                for number, tokens in zip(chosen, self._generate([ids[i] for i in chosen], max_tokens), strict=True):
                    replies[number] = self._reply(prompts[number], texts[number], tokens, max_tokens)
                progress(task, len(replies), len(prompts), "prompts")
        finally:
            model.unload_everything()
        return [replies[number] for number in range(len(prompts))]

    def _load(self) -> None:
        self._model.load_entry()
        for index in range(len(self._model.layers)):
            self._model.load(index, self._model.fetch(index))
        self._model.load_exit()

    def _rendered(self, prompt: Prompt) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(prompt.messages), tools=list(prompt.tools) or None, tokenize=False, add_generation_prompt=True
            )
        )

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        """The ids after each prompt up to and with the end of turn, at most `max_tokens`."""
        stops, device = self._stops(), self._model.device
        width = max(map(len, prompts))
        # Never looked at, so any token will do.
        ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        result: list[list[int]] = [[] for _ in prompts]
        is_done, cache = [False] * len(prompts), None
        for _ in range(max_tokens):
            output = self._model.module(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            ids_BT = output.logits[:, -1:].argmax(-1)
            for row, token in enumerate(ids_BT[:, 0].tolist()):
                if not is_done[row]:
                    result[row].append(token)
                    is_done[row] = token in stops
            if all(is_done):
                break
            mask_BT = torch.cat((mask_BT, mask_BT.new_ones(len(prompts), 1)), dim=1)
            position_BT = position_BT[:, -1:] + 1
        return result

    def _stops(self) -> set[int]:
        config = self._model.module.generation_config
        named = config.eos_token_id if config is not None else None
        stops = {named} if isinstance(named, int) else set(named or ())
        return {int(token) for token in stops | {self._tokenizer.eos_token_id} if token is not None}

    def _reply(self, prompt: Prompt, rendered: str, tokens: list[int], max_tokens: int) -> Reply:
        is_finished = bool(tokens) and tokens[-1] in self._stops()
        # Calls may be written with special tokens, which are text here.
        text = str(self._tokenizer.decode(tokens[:-1] if is_finished else tokens, skip_special_tokens=False))
        # Templates that make a model think open its thinking in the prompt.
        is_thinking = rendered.rstrip().endswith("<think>")
        content, calls = parse_calls(without_thinking(f"<think>{text}" if is_thinking else text), prompt.tools)
        return Reply(text, content, calls, len(tokens), is_finished)
