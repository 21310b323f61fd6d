"""Conversations: turns that go on from the cache say what one long prompt would, documents are read once."""

import dataclasses
import signal

import pytest
import torch
from typer.testing import CliRunner

from hsa_tl.cli import app
from hsa_tl.model import Model, chat, load, preset
from hsa_tl.model.data import ByteTokenizer

MARKS = {"user": "?", "assistant": "!"}


class Marked(ByteTokenizer):
    """Bytes, whose end is a mark that a template writes too."""

    end = ord("|")


def marked(messages, answer):
    return "".join(f"{MARKS[m['role']]}{m['content']}|" for m in messages) + ("!" if answer else "")


@pytest.fixture
def model():
    torch.manual_seed(3)
    made = Model(dataclasses.replace(preset("tiny"), embedding_std=1.0)).eval()
    made.tokenizer = Marked()
    head, letters = made.head, torch.zeros(320, dtype=torch.bool)
    letters[ord("a") : ord("z") + 1] = True
    made.head = lambda h: head(h).masked_fill(~letters, -torch.inf)  # answers are words
    return made


def ask(talk, question, tokens=12, **options):
    return "".join(talk.ask(question, tokens, **options))


def alone(model, text, tokens=12):
    ids = model.tokenizer.encode(text)
    return "".join(chat.pieces(model, model.stream([ids], tokens, eos_token=model.tokenizer.end)))


@pytest.mark.parametrize("ends", (False, True))
def test_turns_say_what_one_prompt_does(ends, model):
    """The document, both questions and the first answer, as the template writes them, also where it ended by itself."""
    document = "a long document. " * 9
    for end in map(chr, range(ord("a"), ord("z"))) if ends else "|":  # some letter comes in the answer
        model.tokenizer.end = ord(end)
        render = lambda *x, end=end: marked(*x).replace("|", end)  # noqa: E731
        talk = chat.Chat(model, render, chat.read(model, document.encode()))
        first = ask(talk, "first")
        if ends == (len(first) < 12):
            break
    first_turn = [{"role": "user", "content": "first"}, {"role": "assistant", "content": first}]
    assert ends == (len(first) < 12) and talk.messages == first_turn
    assert first == alone(model, document + render(first_turn[:1], True))
    second = ask(talk, "second")
    assert second == alone(model, document + render([*first_turn, {"role": "user", "content": "second"}], True))


def test_an_answer_that_is_left_is_gone_on_from(model):
    model.tokenizer.end = None
    talk = chat.Chat(model, marked)
    answer = talk.ask("q", 30)
    said = next(answer) + next(answer)
    answer.close()
    assert ask(talk, "more") == alone(model, f"?q|!{said}|?more|!")


def interrupt(model, at, end):
    """Calls `end` within the model's so many-th token of a text."""
    read = []

    def hook(*_):
        read.append(1)
        if len(read) == at:
            end()

    model.layers[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError))
def test_a_cache_that_an_error_tore_is_of_no_use(model, tmp_path, error):
    def fail():
        raise error

    talk = chat.Chat(model, marked)
    interrupt(model, 3, fail)
    with pytest.raises(error):
        ask(talk, "q")
    for call in (
        lambda: ask(talk, "more"), lambda: talk.cache.crop(1), lambda: talk.cache.save(tmp_path / "cache")
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cache must hold whole segments: read its tokens again, into a new one"):
            call()


def test_ctrl_c_ends_an_answer_between_tokens(model, monkeypatch):
    model.tokenizer.end = None
    said = alone(model, "?q|!", 2)
    interrupt(model, 2, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("hsa_tl.model.pretrained.load", lambda *_: model)
    monkeypatch.setattr(chat, "template", lambda run: marked)
    first, second, _ = run("chat", "x", "--max-new-tokens", 12, given="q\nmore\n").split("\n")
    assert first == said and second == alone(model, f"?q|!{said}|?more|!")


def test_a_template_that_rewrites_turns(model):
    """What the model has read stays; the new turn comes behind it."""
    model.tokenizer.end = None
    render = lambda messages, answer: marked(messages[-1:], answer)  # noqa: E731
    talk = chat.Chat(model, render)
    first = ask(talk, "one")
    assert ask(talk, "two") == alone(model, f"?one|!{first}?two|!")


@pytest.mark.parametrize("render", (marked, chat.lines))
def test_blanks_around_an_answer(render, model, monkeypatch):
    """A template renders answers without them; what the model wrote stays, and nothing is read twice."""
    system = lambda messages, answer: "system" + render(messages, answer)  # noqa: E731
    talk, reads, answers = chat.Chat(model, system), [], iter((b" Four.\n", b"Six. ", b"Eight"))

    def stream(ids, *_, **options):
        reads.append(bytes(ids[0]).decode())
        return map(torch.tensor, [[x] for x in next(answers)])

    monkeypatch.setattr(model, "stream", stream)
    for _ in range(3):
        ask(talk, "q")
    assert reads == (["system?q|!", "|?q|!", "|?q|!"] if render is marked else ["systemq\n", "q\n", "\nq\n"])
    assert [m["content"] for m in talk.messages[1::2]] == ["Four.", "Six.", "Eight"]


def test_pieces_are_the_text_and_few_tokens_are_decoded_for_each(model, monkeypatch):
    text, read = " näh — 漢字 🙂 \n" * 50, []
    decode = model.tokenizer.decode
    monkeypatch.setattr(model.tokenizer, "decode", lambda tokens: read.append(len(tokens)) or decode(tokens))
    found = list(chat.pieces(model, map(torch.tensor, [[x] for x in text.encode()])))
    assert "".join(found) == text and all(len(piece) <= 1 for piece in found) and max(read) <= 8


def test_a_refused_question_is_no_turn(model):
    talk = chat.Chat(model, marked)
    with pytest.raises(ValueError, match="temperature must be finite"):
        ask(talk, "q", temperature=-1.0)
    assert talk.messages == [] and ask(talk, "more") == alone(model, "?more|!")


def test_a_memory_is_written_once_and_loaded(model, tmp_path):
    text, path = b"the document that is kept " * 7, tmp_path / "kept"
    read = []
    first = chat.read(model, text, path, progress=read.append)
    again = chat.read(model, None, path, progress=lambda n: pytest.fail("it is read again"))
    assert read[-1] == len(text) and first.lengths == again.lengths == [len(text)]
    answers = [ask(chat.Chat(model, marked, cache), "q") for cache in (first, again)]
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="file must be left out where the memory holds a text"):
        chat.read(model, text, path)
    with pytest.raises(ValueError, match="memory must be a file that exists, or come with a text"):
        chat.read(model, None, tmp_path / "none")
    with pytest.raises(ValueError, match="file must have at least one token, got an empty text"):
        chat.read(model, b"")
    assert chat.read(model, None) is None


def run(*arguments, code=0, given=None):
    result = CliRunner().invoke(app, [*map(str, arguments), "--threads", "1"], input=given)
    assert result.exit_code == code, result.output
    return result.output


def test_the_commands_keep_a_memory(tmp_path, monkeypatch):
    (tmp_path / "haystack.txt").write_text("MARK k3 v5 n1 n2 MARK k7 v9 n5")
    kept = ("--memory", tmp_path / "kept", "--max-new-tokens", 1)
    assert run("generate", "needle-tiny", "ASK k7", "--file", tmp_path / "haystack.txt", *kept) == "v9\n"
    assert run("generate", "needle-tiny", "ASK k3", *kept) == "v5\n"
    assert "prompt must have at least one token, got ''" in run("generate", "needle-tiny", "", *kept, code=2)
    monkeypatch.setattr("hsa_tl.terminal.EVERY_S", 0)
    shown = run("generate", "needle-tiny", "ASK k7", "--file", tmp_path / "haystack.txt", "--max-new-tokens", 1)
    assert sorted(shown.splitlines()) == ["tokens read: 9", "v9"]
    assert run("chat", "needle-tiny", *kept, given="ASK k7\nASK k3\n").split() == ["v9", "v5"]
    assert "file must be left out" in run(
        "generate", "needle-tiny", "ASK k3", "--file", tmp_path / "haystack.txt", *kept, code=2
    )


def test_plain_models_answer_a_line():
    model = load("needle-tiny")
    assert chat.template("needle-tiny") is None
    assert chat.Chat(model).stop == "\n" and chat.lines([{"role": "user", "content": "a"}], True) == "a\n"
