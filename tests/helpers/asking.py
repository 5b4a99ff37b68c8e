"""Puts a question to a running server, as a client would."""

from __future__ import annotations

import openai
from retrieval.prompts import Question
from server import Server

ANSWER_S = 300


def ask(server: Server, question: Question) -> str:
    """The server's text; the model is served as "lean"."""
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S
    )
    answer = client.completions.create(
        model="lean", prompt=question.prompt, max_tokens=len(question.answer_ids) + 1,
        temperature=0,
    )  # fmt: skip
    assert answer.usage.prompt_tokens == len(question.token_ids)
    return answer.choices[0].text
