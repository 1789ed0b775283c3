"""Decoding with a key/value cache: one prompt or many, token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from lit_lora.errors import InputError
from lit_lora.generate.sample import Sampling, choose
from lit_lora.model import Cache, KVCache, LanguageModel

__all__ = ["Generation", "PrefixCache", "generate"]

# A prompt is read in pieces of this many tokens, which bounds the memory that a long one takes.
_PIECE = 1024
# The shared prefix of several prompts, such as a system message or examples, is read only once from this length on.
_MIN_SHARED_PREFIX = 16


class PrefixCache:
    """A key/value cache with the tokens it was computed from, so that the next prompt is read from where it differs.

    Valid as long as the model's weights do not change.
    """

    def __init__(self) -> None:
        self.cache: Cache | None = None
        self.ids: list[int] = []

    def keep_beginning(self, model: LanguageModel, prompt: Sequence[int], room: int) -> list[int]:
        """Keep what ``prompt`` begins with and drop the rest; returns the tokens that are still to be read.

        Args:
            model: The model that the cache is for.
            prompt: The whole prompt; at least its last token is always read again, for its logits.
            room: Maximum number of tokens that may follow the prompt.
        """
        stored = 0 if self.cache is None else min(len(self.ids), self.cache.length)
        limit = min(stored, len(prompt) - 1)
        shared_prefix = next((place for place in range(limit) if self.ids[place] != prompt[place]), limit)
        if _rotated_anew(model, stored, len(prompt)):
            shared_prefix = 0

        needed = len(prompt) + room
        if self.cache is None or self.cache.max_length < needed:
            # Twice what is needed, so that a chat that grows turn by turn rarely copies its cache.
            larger = model.new_cache(1, min(2 * needed, max(needed, model.context)))
            if self.cache is not None and shared_prefix:
                larger.copy_row(self.cache, 0, shared_prefix)
                larger.advance(shared_prefix)
            self.cache = larger

        self.cache.truncate(shared_prefix)
        self.ids = list(prompt[:shared_prefix])
        return list(prompt[shared_prefix:])


class Generation(Iterator[list[int | None]]):
    """The answers to several prompts as they are generated; made by :func:`generate`.

    Each step yields one token per prompt, the stop token included, and ``None`` for answers that have ended.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop_ids: Collection[int],
        prefix_cache: PrefixCache | None,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._stop_ids = frozenset(stop_ids)
        self._device = _device(model)
        self._prompts = prompts
        self._rows = list(range(len(prompts)))  # the prompt that each row of the cache belongs to
        self._running = [True] * len(prompts)
        context = model.context
        self._left = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]

        self._prefix_cache = prefix_cache
        if prefix_cache is not None:
            waiting = [prefix_cache.keep_beginning(model, prompts[0], max(self._left))]
            assert prefix_cache.cache is not None
            self._cache = prefix_cache.cache
        else:
            waiting = _left_padded(prompts)
            self._cache = _cache_for(model, prompts, max(self._left))
        self._waiting = torch.tensor(waiting, device=self._device)  # (B, T), not yet read
        self._ids = [list(prompt) for prompt in prompts]  # what has been read and drawn
        switch = model.config.rope_switch
        all_rotated_alike = switch is None or all(len(prompt) <= switch for prompt in prompts)
        if prefix_cache is None and len(prompts) > 1 and all_rotated_alike:
            self._read_shared_prefix()

        self._seen: Tensor | None = None
        self._generators = [self._generator() for _ in prompts] if sampling.temperature else []

    def __next__(self) -> list[int | None]:
        """Read the waiting tokens, and draw the next token of every prompt that has not ended."""
        if not any(self._running):
            raise StopIteration
        self._drop_ended_rows()
        self._start_over_if_rotated_anew()
        logits = self._read()
        if self._seen is None and self._sampling.repetition_penalty != 1.0:
            self._seen = self._seen_tokens(logits)

        generators = [self._generators[row] for row in self._rows] if self._generators else []
        tokens = choose(logits, self._sampling, self._seen, generators)
        self._waiting = torch.tensor(tokens, device=self._device)[:, None]
        if self._seen is not None:
            self._seen.scatter_(1, self._waiting, True)

        step: list[int | None] = [None] * len(self._running)
        for row, token in zip(self._rows, tokens, strict=True):
            if self._running[row]:
                step[row] = token
                self._ids[row].append(token)
                self._left[row] -= 1
                self._running[row] = token not in self._stop_ids and self._left[row] > 0
        return step

    def stop(self, row: int) -> None:
        """End the answer to prompt ``row``, such as when its text has reached a stop string."""
        self._running[row] = False

    @torch.no_grad()  # not inference_mode: tensors that a module caches between calls must stay usable in training
    def _read(self) -> Tensor:
        """Feed the waiting tokens to the model; returns the logits after the last one, (B, V)."""
        training = self._model.training
        if training:  # eval() walks over all modules, which is too much to do for every token
            self._model.eval()
        try:
            if isinstance(self._cache, KVCache):
                self._cache.expected = self._waiting.shape[1]
            for piece in torch.split(self._waiting, _PIECE, dim=1):
                hidden = self._model.hidden_states(piece, cache=self._cache)  # (B, T, D)
                if self._prefix_cache is not None:
                    self._prefix_cache.ids += piece[0].tolist()
            return self._model.logits(hidden[:, -1])
        finally:
            if training:
                self._model.train()

    def _read_shared_prefix(self) -> None:
        """Compute the prompts' shared prefix once, and copy it behind the padding of every row of the cache.

        All rows of the cache advance together, by the length of the prefix. A padded row has room for only the
        beginning of it up to there, so it reads the rest of the prefix with its own tokens.
        """
        prompts = [list(prompt) for prompt in self._prompts]
        # The first and the last in lexicographic order differ no later than any other two.
        first, last = min(prompts), max(prompts)
        limit = min(len(prompt) for prompt in prompts) - 1  # at least one token of each is read, for its logits
        shared_prefix = next((place for place in range(limit) if first[place] != last[place]), limit)
        if shared_prefix < _MIN_SHARED_PREFIX:
            return

        cache, waiting = self._cache, self._waiting
        self._cache = self._model.new_cache(1, shared_prefix)
        self._waiting = torch.tensor([first[:shared_prefix]], device=self._device)
        self._read()
        for row, prompt in enumerate(prompts):
            padding = waiting.shape[1] - len(prompt)
            cache.copy_row(self._cache, row, max(shared_prefix - padding, 0), start=padding)
        cache.advance(shared_prefix)
        self._cache = cache
        self._waiting = waiting[:, shared_prefix:]

    def _start_over_if_rotated_anew(self) -> None:
        """Read everything again once a row becomes so long that the keys in the cache are rotated in another way."""
        cache, tokens = self._cache, self._waiting.shape[1]
        if not isinstance(cache, KVCache) or not cache.length:
            return
        if not any(_rotated_anew(self._model, length - tokens, length) for length in cache.lengths(tokens)):
            return
        rows = [self._ids[row] for row in self._rows]
        if self._prefix_cache is not None:
            cache.truncate(0)
            self._prefix_cache.ids = []
        else:
            self._cache = _cache_for(self._model, rows, max(self._left))
        self._waiting = torch.tensor(_left_padded(rows), device=self._device)

    def _drop_ended_rows(self) -> None:
        """Remove ended rows from the cache once they are half of it, so that a few long answers do not pay for them."""
        running = [index for index, row in enumerate(self._rows) if self._running[row]]
        if len(running) > len(self._rows) // 2:
            return
        index = torch.tensor(running, device=self._device)
        self._cache.select(index)
        self._waiting = self._waiting[index]
        if self._seen is not None:
            self._seen = self._seen[index]
        self._rows = [self._rows[position] for position in running]

    def _seen_tokens(self, logits: Tensor) -> Tensor:
        """(B, V) bool: the tokens that occur in each prompt."""
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=self._device)
        for row, index in zip(seen, self._rows, strict=True):
            row[torch.tensor(self._prompts[index], device=self._device)] = True
        return seen

    def _generator(self) -> torch.Generator:
        generator = torch.Generator(device=self._device)
        if self._sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self._sampling.seed)
        return generator


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
    prefix_cache: PrefixCache | None = None,
) -> Generation:
    """Answer prompts token by token. The rows do not influence one another.

    Args:
        model: The model; it is used in evaluation mode.
        prompts: Ids of each prompt.
        sampling: How to draw.
        stop_ids: Tokens that end an answer; they are yielded too.
        prefix_cache: What the model has already read; a single prompt is computed only from where it differs. Updated
            in place.

    Raises:
        InputError: A prompt is empty or leaves no room in the model's context.
        ValueError: A prefix cache was given for several prompts.
    """
    if prefix_cache is not None and len(prompts) != 1:
        raise ValueError("a prefix cache serves one prompt")
    context = model.context
    for prompt in prompts:
        if not prompt:
            raise InputError("the prompt is empty")
        if len(prompt) >= context:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for an answer: the model's context is "
                f"{context}",
                hint="shorten the prompt",
            )
    return Generation(model, prompts, sampling, stop_ids, prefix_cache)


def _rotated_anew(model: LanguageModel, before: int, after: int) -> bool:
    """Whether the keys of a sequence of ``before`` tokens are of no use once it has ``after``."""
    switch = model.config.rope_switch
    return switch is not None and (before > switch) != (after > switch)


def _device(model: LanguageModel) -> torch.device:
    return next(model.parameters()).device


def _left_padded(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts padded on the left to one length; any id will do, since the cache masks the padding."""
    longest = max(len(prompt) for prompt in prompts)
    return [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]


def _cache_for(model: LanguageModel, prompts: Sequence[Sequence[int]], room: int) -> Cache:
    """A cache for prompts padded on the left, and ``room`` tokens after them."""
    longest = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=_device(model))
    return model.new_cache(len(prompts), longest + room, padding=padding)
