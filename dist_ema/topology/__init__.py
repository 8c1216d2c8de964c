"""From a model to boxes: the only package that knows the parallelisms. No communication.

    planning   the first layout that claims a tensor locates it -> Plan; LAYOUTS has one line for every layout
      plain, dtensor, fsdp1, zero3, extra, experts   one layout a file: its boxes, and the ranks that hold them alike
    meshes     what a rank holds of a tensor that is placed on a device mesh; runs: its arithmetic
    masters    DeepSpeed's fp32 masters, averaged in place of live weights
    names      every tensor of the model, once, with all its canonical names
    values     the tensors whose values a file can have
    seam       the interface of a layout, a Protocol of four methods, and the records that the files exchange; the
               arithmetic of runs and meshes; torch's types of sharding, where they are loaded

| live tensor | box | ranks that hold it alike |
|---|---|---|
| plain, one process | everything | this rank |
| plain, in DDP | everything | the ranks of its process group |
| plain, in a plain module of an initialised process group | everything | all ranks |
| DTensor (FSDP2, HSDP, TP and their combinations) | one, or several | the ranks along the Replicate axes of its mesh |
| in a flat parameter of FSDP1 | at most a few boxes | none; the ranks across the hybrid group; all, for NO_SHARD |
| partitioned by DeepSpeed's ZeRO-3 | at most a few boxes | none |
| plain, declared by `experts=` | its place in the whole tensor | found by content, as no layout tells |
| buffer | everything | all ranks; rank 0 is the owner, because DDP broadcasts its copy |

A further parallelism needs one more file here and one more line in `LAYOUTS`: see docs/extending.md.
"""
