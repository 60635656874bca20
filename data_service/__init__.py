"""Which tokens come next: sources, the mixture of them, and the batch as a pure function.

Usable alone, in any training loop; it needs `storage/` and no torch:

    sources = {"web": open_source("web", "data/web")}
    web = PlanSource(
        name="web",
        url="data/web",
        fingerprint=sources["web"].fingerprint,
        weights=((0, 1_000_000),),
    )
    plan = Plan(segments=(Segment(from_step=0, sources=(web,)),))
    batches = Batches(plan=plan, sources=sources, seed=1, context=128, global_batch_size=16)
    tokens = batches.batch(step)  # (16, 129) int64: inputs [:, :-1], targets [:, 1:]
"""
