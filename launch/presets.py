"""Named configurations: from a CPU's toy to GPT-2 345M, and the recipes of the systems before this.

Everything in them can be overridden. A recipe weighs sources that `--data` must give, by name;
`docs/recipes.md` shows how each is prepared.
"""

from typing import Any

_RANGEFLOW_GPT: dict[str, dict[str, Any]] = {
    "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "context": 1024, "dropout": 0.1},
    "batch": {"global_batch_size": 126, "micro_batch_size": 6, "virtual_ranks": 7},
    "optimizer": {"optimizer": "adamw8bit"},
    "schedule": {"max_steps": 25_000, "learning_rate": 1e-4, "warmup_steps": 1750},
    "loop": {
        "save_interval_steps": 100,
        "sample_interval_steps": 100,
        "log_interval_steps": 10,
        "sample_prompts": ("The future of AI is", "Once upon a time,"),
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "course-tiny": {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 128, "context": 128, "dropout": 0.1},
        "batch": {"global_batch_size": 32, "micro_batch_size": 8},
        "schedule": {"max_steps": 5000, "learning_rate": 1e-3, "min_learning_rate": 1e-4},
    },
    "course-small": {
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 256, "context": 256, "dropout": 0.1},
        "batch": {"global_batch_size": 64, "micro_batch_size": 8},
        "schedule": {"max_steps": 5000, "learning_rate": 1e-3, "min_learning_rate": 1e-4},
    },
    "course-medium": {
        "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "context": 256, "dropout": 0.2},
        "batch": {"global_batch_size": 64, "micro_batch_size": 8},
        "schedule": {"max_steps": 5000, "learning_rate": 1e-3, "min_learning_rate": 1e-4},
    },
    "gpt2-124m": {
        "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "context": 1024},
        "batch": {"global_batch_size": 480, "micro_batch_size": 6, "virtual_ranks": 8},
        "schedule": {
            "max_steps": 5100,
            "learning_rate": 6e-4,
            "min_learning_rate": 6e-5,
            "warmup_steps": 200,
        },
        "loop": {
            "save_interval_steps": 100,
            "sample_interval_steps": 500,
            "log_interval_steps": 10,
            "sample_prompts": ("The future of AI is", "Once upon a time,"),
        },
    },
    "gpt2-345m": {
        "model": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "context": 1024},
        "batch": {"global_batch_size": 480, "micro_batch_size": 4, "virtual_ranks": 8},
        "schedule": {
            "max_steps": 14500,
            "learning_rate": 3e-4,
            "min_learning_rate": 3e-5,
            "warmup_steps": 500,
        },
        "loop": {
            "save_interval_steps": 100,
            "sample_interval_steps": 500,
            "log_interval_steps": 10,
            "sample_prompts": ("The future of AI is", "Once upon a time,"),
        },
    },
    "c4": {**_RANGEFLOW_GPT, "weights": ("c4=1",)},
    "instruct-mixture": {
        **_RANGEFLOW_GPT,
        "weights": ("cosmopedia=0.5", "alpaca=0.3", "python=0.2"),
    },
    "c4-to-mixture": {  # 90/10 where the mixture begins, then linearly; an abrupt switch spoils
        **_RANGEFLOW_GPT,
        "weights": (
            "c4=1@14999,0.9@15000,0@20000",
            "cosmopedia=0@14999,0.05@15000,0.5@20000",
            "alpaca=0@14999,0.03@15000,0.3@20000",
            "python=0@14999,0.02@15000,0.2@20000",
        ),
    },
    "gutenberg": {
        "model": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "context": 512, "dropout": 0.1},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2, "virtual_ranks": 4},
        "optimizer": {"weight_decay": 0.05},
        "schedule": {"max_steps": 6150, "learning_rate": 2e-4, "warmup_steps": 100},
        "loop": {
            "eval_interval_steps": 100,
            "eval_windows": 16,
            "save_interval_steps": 500,
            "sample_interval_steps": 1230,
            "sample_prompts": ("Once upon a time",),
        },
        "weights": ("gutenberg=1",),
    },
    "shakespeare": {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 128, "context": 128, "dropout": 0.1},
        "batch": {"global_batch_size": 32, "micro_batch_size": 8},
        "schedule": {
            "max_steps": 5000,
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "warmup_steps": 100,
        },
        "loop": {"sample_prompts": ("ROMEO:", "First Citizen:")},
        "weights": ("shakespeare=1",),
    },
}
"""Section, field and value of what differs from `tiny`. The steps of the GPT-2 sizes are 20 tokens
a parameter (Hoffmann et al. 2022); an epoch of 20 books is about 1,230 steps of `gutenberg`."""
