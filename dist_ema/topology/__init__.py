"""From a model to boxes: the only package that knows the parallelisms. No communication.

    planning   every tensor located by the first layout that claims it -> Plan; LAYOUTS has one line for each
      plain, dtensor, fsdp1, extra   a layout each: its boxes, and the ranks that hold them alike
    names      every tensor of the model, once, with all its canonical names
    values     which tensors a file can hold
    layout     what a layout is: a Protocol of four methods, and the records that they exchange

| live tensor | box | ranks that hold it alike |
|---|---|---|
| plain, one process | everything | this one |
| plain, in DDP or in a plain module of an initialised process group | everything | all ranks |
| DTensor (FSDP2, HSDP, TP and their combinations) | its local piece | the ranks along the Replicate axes of its mesh |
| in a flat parameter of FSDP1 | at most a few boxes | none; the ranks across the hybrid group; all, for NO_SHARD |
| buffer | everything | all ranks, owned by rank 0: its copy is the one DDP broadcasts |

A further parallelism is one more file here and one more line in `LAYOUTS`: docs/extending.md.
"""
