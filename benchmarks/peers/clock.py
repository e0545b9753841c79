"""The seconds of each step of a transformers Trainer, for the scripts beside this one."""

import time

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *arguments, **named):
        self.began = time.perf_counter()

    def on_step_end(self, *arguments, **named):
        self.seconds.append(time.perf_counter() - self.began)
