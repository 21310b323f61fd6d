"""A conversation with a trained model: a document that is read once, and turns that go on from it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hsa_tl.model import pretrained
from hsa_tl.model.cache import Cache
from hsa_tl.model.generate import prefill
from hsa_tl.validation import require

Render = Callable[[list[dict[str, str]], bool], str]  # messages, whether an answer comes next -> text


def read(model, text: bytes | None, memory: Path | None = None, progress=None) -> Cache | None:
    """The cache of a model that has read a text; None without one.

    memory: a file that keeps the cache. Where there is one it is loaded, else it is written. progress: as in `prefill`.
    ValueError: a text beside a memory that holds one, or a memory that is to be loaded and is not there.
    """
    kept = memory is not None and memory.exists()
    if kept:
        require(text is None, "file", "be left out where the memory holds a text", f"{memory}, which exists")
        return model.load_cache(memory)
    if text is None:
        require(memory is None, "memory", "be a file that exists, or come with a text to be read", memory)
        return None
    ids = [*model.tokenizer.begin, *model.tokenizer.encode(text)]
    require(len(ids) > 0, "file", "have at least one token", "an empty text")
    _, cache = prefill(model, [ids], progress=progress)
    if memory is not None:
        cache.save(memory)
    return cache


def pieces(model, stream: Iterator[torch.Tensor]) -> Iterator[str]:
    """The text of a stream of one prompt's tokens, as soon as its characters are whole."""
    tokens, written, tokenizer = [], 0, model.tokenizer  # some tokenizers drop the first blank: one piece stays before
    rest = lambda: tokenizer.decode(tokens)[len(tokenizer.decode(tokens[:written])) :]  # noqa: E731
    for token in stream:
        tokens += [t for t in token.tolist() if t != tokenizer.end]
        text = rest()
        if text and not text.endswith("\ufffd"):  # else a character may be cut in two
            yield text
            tokens, written = tokens[written:], len(tokens) - written
    if tokens:
        yield rest()


def lines(messages: list[dict[str, str]], answer: bool) -> str:
    """What a model that was not trained on chats reads: the messages, a line each."""
    return "".join(message["content"] + "\n" for message in messages)


def template(run: str | Path) -> Render | None:
    """The chat template of the tokenizer that a converted run keeps; None where it has none."""
    folder = Path(run) / pretrained.TOKENIZER
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        return None
    return lambda messages, answer: tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer
    )


class Chat:
    """Turns of a conversation, each read behind all before it. cache: of what stands before the conversation."""

    def __init__(self, model, render: Render | None = None, cache: Cache | None = None):
        self.model, self.render = model, render or lines
        self.stop = "\n" if render is None else ()  # where messages are lines, an answer is one
        self.cache = cache or model.new_cache(1)
        self.messages: list[dict[str, str]] = []
        self.text, self.tail = "", ""  # of the conversation as it is rendered, and blanks that the model has behind it

    def ask(self, question: str, max_new_tokens: int, **options) -> Iterator[str]:
        """The answer's pieces. options: temperature, top_p and seed of `Generation.stream`.

        A caller may leave it before the end: the next question comes behind what was written.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        text = self.render(messages, True)
        if not text.startswith(self.text):  # a template that writes earlier turns in another way than they were
            text = self.text + self.render(messages[-1:], True)
        tokenizer, unread = self.model.tokenizer, self.cache.unread
        ids = tokenizer.encode(text[len(self.text) :].removeprefix(self.tail))
        if unread is not None and unread[0].tolist() == [tokenizer.end] == ids[:1]:
            ids = ids[1:]  # the answer before has ended with it
        if self.render is lines and not any(self.cache.lengths):
            ids = [*tokenizer.begin, *ids]
        end = {"eos_token": tokenizer.end, "stop": self.stop}
        stream = self.model.stream([ids], max_new_tokens, cache=self.cache, **end, **options)
        self.messages, said = messages, ""
        try:
            for piece in pieces(self.model, stream):
                said += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said.strip()})
            self.text, self.tail = text + said.strip(), said[len(said.rstrip()) :]
