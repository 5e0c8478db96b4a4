"""Chats as text, and as the arrays that a `CausalLM` trains on."""

import dataclasses

import numpy as np
from keras_hub.models import CausalLM
from keras_hub.tokenizers import Tokenizer

from keras_svdtune.demo.pirate import Pair

NEW_TOKENS = 40  # the longest answer that is generated


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How a model expects to be asked.

    Attributes:
        before: str, comes before the question.
        after: str, comes between the question and the answer.
        lead: str, opens the answer.
        ends_with: str or None, text that ends an answer where the model has
            not learnt to stop, as a base model has not.
    """

    before: str
    after: str
    lead: str = ""
    ends_with: str | None = None

    def prompt(self, question: str) -> str:
        """The text that the model is to go on with."""
        return f"{self.before}{question}{self.after}"


# The start token comes first of all; KerasHub adds it. ChatML's is the
# <|im_start|> that opens the user's turn.
CHATML = ChatFormat("user\n", "<|im_end|>\n<|im_start|>assistant\n")
GEMMA = ChatFormat(
    "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
)
PLAIN = ChatFormat("Question: ", "\nAnswer:", lead=" ", ends_with="\n")


def format_for(task: CausalLM, name: str) -> ChatFormat:
    """The format of a model, told from its name and its vocabulary."""
    vocabulary = task.preprocessor.tokenizer.get_vocabulary()
    if "<|im_start|>" in vocabulary:
        return CHATML
    if "instruct" in name and "<start_of_turn>" in vocabulary:
        return GEMMA
    return PLAIN


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What `fit` and `evaluate` take.

    Attributes:
        x: dict of arrays (pairs, length): `token_ids` and `padding_mask`.
        y: array (pairs, length), the next tokens.
        weight: array (pairs, length), 0 where the next token is not part of
            an answer. Its mean is 1, so that Keras' mean over everything is
            the mean over the tokens of the answers.
    """

    x: dict[str, np.ndarray]
    y: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, index: np.ndarray) -> "Arrays":
        """Some pairs, in the order of `index`."""
        x = {name: array[index] for name, array in self.x.items()}
        return Arrays(x, self.y[index], self.weight[index])


def encode(
    task: CausalLM, chat: ChatFormat, pairs: list[Pair], length: int
) -> Arrays:
    """Tokenizes pairs. Those longer than `length` tokens are left out."""
    tokenizer = task.preprocessor.tokenizer
    tokens = np.full((len(pairs), length + 1), tokenizer.pad_token_id, "int32")
    is_text = np.zeros((len(pairs), length + 1), "int32")
    is_answer = np.zeros((len(pairs), length + 1), "float32")
    row = 0
    for pair in pairs:
        prompt = [tokenizer.start_token_id]
        prompt += ids(tokenizer, chat.prompt(pair.question))
        answer = ids(tokenizer, chat.lead + pair.answer)
        answer += [tokenizer.end_token_id]
        end = len(prompt) + len(answer)
        if end > length + 1:
            continue
        tokens[row, :end] = prompt + answer
        is_text[row, :end] = 1
        is_answer[row, len(prompt) : end] = 1
        row += 1
    if not row:
        raise ValueError(
            f"None of the {len(pairs)} pairs fits into {length} tokens."
        )
    weight = is_answer[:row, 1:]
    return Arrays(
        x={
            "token_ids": tokens[:row, :-1],
            "padding_mask": is_text[:row, :-1],
        },
        y=tokens[:row, 1:],
        weight=weight / weight.mean(),
    )


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text."""
    return [int(i) for i in np.asarray(tokenizer(text))]


def answers(
    task: CausalLM, chat: ChatFormat, questions: list[str]
) -> list[str]:
    """What the model answers, always the likeliest token next (greedy)."""
    prompts = [chat.prompt(question) for question in questions]
    tokenizer = task.preprocessor.tokenizer
    longest = max(len(ids(tokenizer, prompt)) for prompt in prompts)
    texts = task.generate(
        prompts, max_length=longest + 1 + NEW_TOKENS, strip_prompt=True
    )
    if chat.ends_with is not None:
        texts = [text.strip().split(chat.ends_with)[0] for text in texts]
    return [text.strip() for text in texts]
