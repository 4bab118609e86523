"""`transformers serve` in this process, its model attached after loading, asked by the `openai` client.

pip install "transformers[serving]"; python examples/integrations/transformers_serve.py [--model FOLDER]
"""

import socket
import time
from urllib.error import URLError
from urllib.request import urlopen

from local_model import PROMPTS, folder
from openai import OpenAI
from transformers.cli.serve import Serve

import hf_onlinespec


def ask(client: OpenAI, model: str) -> list[str]:
    """Chats and completions, each at once and streamed."""
    answers = []
    for prompt in PROMPTS:
        chat = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24}
        completion = {"model": model, "prompt": prompt, "max_tokens": 24}
        answers.append(client.chat.completions.create(**chat).choices[0].message.content)
        parts = client.chat.completions.create(stream=True, **chat)
        answers.append("".join(part.choices[0].delta.content or "" for part in parts if part.choices))
        answers.append(client.completions.create(**completion).choices[0].text)
        answers.append("".join(part.choices[0].text for part in client.completions.create(stream=True, **completion)))
    return answers


def wait_for(url: str) -> None:
    for _ in range(200):
        try:
            urlopen(url).close()
            return
        except URLError:
            time.sleep(0.1)
    raise TimeoutError(f"{url} did not answer within twenty seconds")


def main() -> None:
    name = str(folder(__doc__))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=name, device="cpu", dtype="float32", host="127.0.0.1", port=port, non_blocking=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wait_for(f"http://127.0.0.1:{port}/health")
        (loaded,) = server._model_manager.loaded_models.values()
        loaded.model.generation_config.do_sample = False
        plain = ask(client, name)
        draft = hf_onlinespec.attach(loaded.model)
        served = ask(client, name)
    finally:
        server.kill_server()
    assert served == plain, (served, plain)
    assert draft.metrics.requests == len(served) and 0 < draft.metrics.rounds < draft.metrics.new_tokens
    print(
        f"{len(served)} answers equal plain generation's; {draft.metrics.acceptance_length:.2f} tokens per target forward"
    )


if __name__ == "__main__":
    main()
