"""What adapters teach a frozen base: the held-out loss of answers, before and behind a LoRA finetune.

    python -m benchmarks.answers --data TEXT
    python -m benchmarks.answers --data TEXT --preset tiny --base-steps 320 --steps 400 --lr 0.005

A small base learns the first nine tenths of the text. Two sets of instructions are made of the text's lines:
`upper`, say the line in upper case, and `next`, give the line that follows. Adapters learn from the lines of
the first part and are measured on those of the last tenth (`arbitor finetune`). Each set is learnt once more
with its answers shuffled among the prompts, as a control: what falls there is due to knowing what answers
look like and where they end, not to the prompt. A set is a row of `benchmarks/results/answers-<device>.csv`
and is skipped the next time.
"""
