"""Running a teacher once into a cache: loaders, language models, processes, a Ray cluster, a vLLM server."""
