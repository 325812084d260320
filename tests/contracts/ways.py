"""What lorasync does with a vLLM: the columns of the support table."""

HERE = "`LLM` in this process"
THERE = "`LLM`, core in another process"
ASYNC = "`AsyncLLM`"
REPLICAS = "`AsyncLLM`, every replica of `data_parallel_size`"
MERGED = "merged weights"
FACTORS = "factors (`MergeInWorker`)"
ADAPTER = "adapter (`ServeAdapter`)"
SOURCE = "vLLM's own `WeightSource`"
NAMES = "versions named in outputs"
ACCEPTING = "new requests queue during a pause `wait` or `abort`"
CPU_EXPERTS = "experts of a CPU engine, loaded anew"

ENGINES = (HERE, THERE, ASYNC)
WEIGHTS = (MERGED, FACTORS)
PUSHES = (MERGED, FACTORS, ADAPTER)
ALL = (*ENGINES, *PUSHES)
COLUMNS = (*ALL, REPLICAS, SOURCE, NAMES, CPU_EXPERTS, ACCEPTING)
