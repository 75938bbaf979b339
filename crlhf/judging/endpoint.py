"""A language model behind an address that speaks the chat-completions protocol, and the file that keeps its answers.

Every answer is on the disk before the next question, so a comparison that was stopped asks only for what is missing.
"""

import email.utils
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..config import JudgeConfig, UserError
from ..engine.files import Progress, append_jsonl
from .pairs import Question

LONGEST_PAUSE = 600.0  # seconds
LONGEST_REPLY = 2**22  # bytes
SHORTEST_SECRET = 8  # letters: a shorter key is a placeholder, and may be a word of an answer
REFUSALS = {401: "set the key", 403: "set another key", 404: "check the address and --judge-model"}
REFUSALS |= dict.fromkeys((301, 302, 303, 307, 308), "give the address that it sends on to")


class RefuseRedirects(urllib.request.HTTPRedirectHandler):
    """An answer that sends us elsewhere is refused: the key would go along."""

    def redirect_request(self, *arguments: object) -> None:
        return None


OPENER = urllib.request.build_opener(RefuseRedirects)


@dataclass
class Endpoint:
    """Where to ask, and as whom. The key is sent, and never written or shown."""

    url: str
    model: str
    key: str = ""
    timeout: float = JudgeConfig.judge_timeout
    retries: int = JudgeConfig.judge_retries
    wait: Callable[[float], None] = time.sleep

    def ask(self, messages: list[dict]) -> tuple[str, int]:
        """(answer, tokens) at temperature 0. What may pass is tried again; what may not is a UserError."""
        request = self.request(messages)
        for attempt in range(self.retries + 1):
            pause = 2.0**attempt
            try:
                return self.read_reply(self.fetch(request))
            except urllib.error.HTTPError as error:
                may_pass = error.code in (408, 429) or error.code >= 500
                if not may_pass:
                    mend = REFUSALS.get(error.code, "check --judge-model, and that a pair isn't too long for it")
                    raise UserError(f"{self.shown} refuses (status {error.code})", mend) from None
                trouble = f"status {error.code}"
                pause = retry_after(error.headers.get("Retry-After"), pause)
            except TimeoutError:
                trouble = "timed out"
            except (OSError, ValueError, http.client.HTTPException) as error:  # down, cut off, no HTTP
                reason = getattr(error, "reason", error)
                trouble = str(reason) or type(error).__name__
            if attempt < self.retries:
                self.wait(pause)
        what = f"{self.shown} doesn't answer ({trouble}, {self.retries + 1} tries)"
        raise UserError(what, "see that it runs, and repeat the command: no answer is asked for twice")

    @property
    def shown(self) -> str:
        return f"--judge-url {without_secrets(self.url)}"

    def hide_key(self, text: str) -> str:
        """The text without the key, should a reply repeat it: as it is, or as JSON writes it."""
        if len(self.key) < SHORTEST_SECRET:
            return text
        as_json = json.dumps(self.key)[1:-1]
        return text.replace(self.key, "***").replace(as_json, "***")

    def request(self, messages: list[dict]) -> urllib.request.Request:
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0})
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        address = parts._replace(path=path, fragment="").geturl()
        return urllib.request.Request(address, body.encode(), headers)

    def fetch(self, request: urllib.request.Request) -> bytes:
        """The body of a reply, or the first bytes of one that is too long; TimeoutError if it isn't whole in time.

        In a thread, since a socket's own timeout begins anew with each byte of a reply that drips.
        """
        future = Future()

        def work() -> None:
            try:
                with OPENER.open(request, timeout=self.timeout) as reply:
                    future.set_result(reply.read(LONGEST_REPLY + 1))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future.result(self.timeout)

    def read_reply(self, reply: bytes) -> tuple[str, int]:
        """(answer, tokens) of a chat completion."""
        mend = "give the address of a chat-completions endpoint, which mostly ends in /v1"
        if len(reply) > LONGEST_REPLY:
            raise UserError(f"{self.shown} answers more than {LONGEST_REPLY >> 20} MB", mend)
        try:
            completion = json.loads(reply)
            content = str(completion["choices"][0]["message"]["content"] or "")
            usage = completion.get("usage")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            start = self.hide_key(reply.decode("utf-8", "replace"))[:60].replace("\n", " ")
            raise UserError(f"{self.shown} answers something else ({start!a})", mend) from None
        answer = self.hide_key(content).encode("utf-8", "replace").decode()  # half of a surrogate pair can't be written
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
        is_count = isinstance(tokens, int) and 0 <= tokens < 10**9
        return answer, tokens if is_count else 0


def retry_after(header: str | None, otherwise: float | None = None) -> float | None:
    """Seconds to wait, from the header's seconds or date, at most ten minutes; `otherwise` where it says neither."""
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return otherwise
    return min(max(0.0, seconds), LONGEST_PAUSE)  # in this order a header of 'nan' is 0


def is_address(url: str) -> bool:
    """Is it an address of http or https that can be sent as it stands?"""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        is_port = parts.port != 0
    except ValueError:  # no number, brackets that don't close, a name that no host can have
        return False
    is_plain = url.isascii() and url.isprintable() and " " not in url
    return is_plain and is_port and host != b"" and parts.scheme in ("http", "https")


def without_secrets(url: str) -> str:
    """An address as it may be shown: without name and password, query and fragment. It may be no address at all."""
    return re.sub(r"^(\w*:?//)?.*@|[?#].*", r"\1", url, flags=re.DOTALL)


def read_answers(path: Path) -> dict[str, str]:
    """Name of a question -> answer. A line that a kill cut in two is left out, and asked again."""
    answers = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            answers[row["name"]] = str(row["answer"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return answers


def ask_missing(endpoint: Endpoint, questions: list[Question], answers: dict[str, str], path: Path) -> None:
    """Ask what has no answer yet, and add each answer to `answers` and to the file."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        append_jsonl(path, [{}])  # ends the line that a kill cut
    missing = {question.name: question for question in questions if question.name not in answers}
    tokens = 0
    with Progress(len(questions), f"asking {endpoint.model}", len(questions) - len(missing)) as bar:
        for name, question in missing.items():
            answer, used = endpoint.ask(question.messages)
            append_jsonl(path, [{"name": name, "answer": answer, "tokens": used}])
            answers[name] = answer
            tokens += used
            bar.set_postfix_str(f"{tokens} tokens", refresh=False)
            bar.update()
