"""Named configurations: from a CPU's toy to GPT-2 345M. Everything in them can be overridden."""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
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
}
"""Section, field and value of what differs from `tiny`. The steps of the GPT-2 sizes are 20 tokens
a parameter (Hoffmann et al. 2022)."""
