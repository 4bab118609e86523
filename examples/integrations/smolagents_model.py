"""smolagents' `TransformersModel`, its model attached after loading: at once, streamed, and as the model of a `CodeAgent`.

pip install smolagents; python examples/integrations/smolagents_model.py [--model FOLDER]
"""

from local_model import PROMPTS, folder
from smolagents import CodeAgent, TransformersModel

import hf_onlinespec


def ask(model: TransformersModel) -> list[str]:
    answers = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        answers.append(model.generate(messages, max_new_tokens=24).content)
        answers.append(model.generate(messages, max_new_tokens=24, stop_sequences=["\n\n"]).content)
        answers.append("".join(part.content for part in model.generate_stream(messages, max_new_tokens=24)))
    # A small model finishes no task; the agent's two steps are two long prompts with stop sequences.
    agent = CodeAgent(tools=[], model=model, max_steps=2, verbosity_level=0)
    agent.run("How much is 2 + 3?")
    steps = [step.model_output for step in agent.memory.steps if "model_output" in vars(step)]
    return [*answers, *(text for text in steps if text)]


def main() -> None:
    model = TransformersModel(model_id=str(folder(__doc__)), device_map="cpu", torch_dtype="float32", max_new_tokens=24)
    model.model.generation_config.do_sample = False
    plain = ask(model)
    draft = hf_onlinespec.attach(model.model)
    served = ask(model)
    assert served == plain, (served, plain)
    assert draft.metrics.requests >= len(served) and 0 < draft.metrics.rounds < draft.metrics.new_tokens
    print(
        f"{len(served)} answers equal plain generation's; {draft.metrics.acceptance_length:.2f} tokens per target forward"
    )


if __name__ == "__main__":
    main()
