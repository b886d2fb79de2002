"""Settings of the retriever and of the index it builds."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, model_validator

from services.contract.config.base import Fraction, NonNegative, Positive, Seconds, Section


class Bm25Config(Section):
    """Lucene's BM25, by pyserini."""

    index: Path | None = None
    """A Lucene index folder, or `hub:NAME`. None: that of `<data.directory>/bm25`, which `index build` makes."""
    k1: Annotated[float, Field(ge=0)] = 0.9
    """How slowly repeated words stop to count."""
    b: Fraction = 0.4
    """How much a passage's length counts against it."""
    heap: Annotated[str, Field(pattern=r"^[1-9][0-9]*[mMgG]$")] = "2g"
    """Memory that Java may take at most, beside the index, which is mapped and not read into it."""


class HybridConfig(Section):
    """Reciprocal rank fusion of dense and BM25."""

    depth: Positive = 100
    """Passages taken from each."""
    k: Annotated[float, Field(gt=0)] = 60
    """A passage at rank r of one ranking gets 1 / (k + r) from it."""


class RerankConfig(Section):
    """A cross-encoder that orders what the first stage found."""

    model: Path | None = None
    """A Hugging Face folder of a sequence classifier with one output, or `hub:NAME`. None loads no reranker."""
    depth: Positive = 20
    """Passages of the first stage that it sees; never fewer than topk."""
    always: bool = True
    """Whether requests that do not say `rerank` are reranked."""
    max_tokens: Positive = 512
    """Query and passage together; what is too long loses its end, the longer of the two first."""


class WebConfig(Section):
    """A search provider's API instead of a corpus. The key comes from the environment: FORAGE_RETRIEVER__WEB__API_KEY."""

    provider: Literal["serper", "google", "serpapi"] = "serper"
    """serper.dev, Google's Custom Search JSON API, or SerpAPI."""
    url: str | None = None
    """None: the provider's own address."""
    api_key: SecretStr | None = None
    """Only from the environment: FORAGE_RETRIEVER__WEB__API_KEY."""
    engine_id: str | None = None
    """Google Custom Search: the `cx` of the search engine."""
    engine: str = "google"
    """SerpAPI: which engine it asks."""
    country: str = "us"
    language: str = "en"
    timeout_s: Seconds = 20
    """One page of results, with its retries; then 502. Waiting for a free place among `concurrency` is not counted."""
    attempt_timeout_s: Seconds = 10
    """One request to the provider; after it the next retry."""
    retries: NonNegative = 2
    """After a 429, a 5xx, a broken connection or no answer in time."""
    retry_wait_s: Seconds = 0.5
    """Before the first retry, doubled for each further one, with jitter; `Retry-After` is kept if it is longer."""
    concurrency: Positive = 32
    """Provider requests under way."""
    queue_size: Positive = 2048
    """Queries under way or waiting, those in the cache not counted; beyond it requests are answered 503 with Retry-After."""
    cache_size: NonNegative = 20_000
    """Pages of results kept (each was paid for), and as many passages of fetched pages."""
    cache_ttl_s: Annotated[float, Field(ge=0)] = 86_400
    """How long they are kept; 0 keeps nothing."""
    pages: bool = False
    """Fetch the pages that were found and return their text around the snippet; otherwise the snippets alone."""
    page_chars: Positive = 2000
    """Characters of a passage's text, at most."""
    max_page_bytes: Positive = 2_000_000
    """After decompression; a larger page is replaced by its snippet."""
    page_timeout_s: Seconds = 5
    """One page, from connecting to the last byte, redirects included; a page that is not there by then is replaced by its
    snippet. Waiting for a free place is not counted."""
    page_redirects: NonNegative = 5
    """Most that are followed to a page; each address is checked like the first."""
    page_ports: list[Annotated[int, Field(ge=1, le=65535)]] = [80, 443]
    """Pages at other ports are refused."""
    page_concurrency: Positive = 64
    """Page fetches under way."""
    pages_per_host: Positive = 2
    """Page fetches under way at one host."""
    user_agent: str = "Mozilla/5.0 (compatible; Forage)"
    """How page fetches introduce themselves."""
    extract_processes: Positive = 2
    """Processes that find the main text of the fetched pages."""
    extract_timeout_s: Seconds = 5
    """One page; a process that takes longer is killed, and the page replaced by its snippet."""
    page_networks: list[IPv4Network | IPv6Network] = []
    """Networks that pages are fetched from although they are private, such as an intranet's. All other addresses that are not
    public are refused: a web page must not make us read our own network."""


BackendName = Literal["dense", "bm25", "hybrid", "web"]


class RetrieverConfig(Section):
    url: str = "http://127.0.0.1:8000"
    """Where the rollout workers find the service."""
    host: str = "127.0.0.1"
    """Where the service listens."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    backends: Annotated[list[BackendName], Field(min_length=1)] = ["dense"]
    """What is served; the first answers requests that do not say. Only what is named is loaded (`hybrid` needs dense and bm25)."""
    encoder: Path | None = None
    """A Hugging Face folder of an embedding model, or `hub:NAME`. None: `<data.directory>/models/encoder`."""
    passage_encoder: Path | None = None
    """The folder that encodes passages, where it is another model than the queries', as DPR's two halves are. None: `encoder`."""
    encoder_family: Literal["auto", "e5", "bge", "dpr", "contriever", "t5", "minilm", "plain", "hashing"] = "auto"
    """Decides prefix, pooling and normalisation. `auto` reads it off the folder's name, then off its config.json. `plain` (Jina
    and others): mean of the tokens, no prefix, not normalised. `hashing` needs no model (tests)."""
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; tokens are pooled in float32 all the same."""
    encoder_device: Literal["cpu", "cuda"] = "cpu"
    """While serving the first GPU; each of `index_workers` takes the next one."""
    encoder_runtime: Literal["auto", "torch", "onnx", "onnx-int8"] = "auto"
    """What computes the vectors. `auto`: ONNX Runtime on a CPU in float32, where the model can be exported (the same vectors, in
    less time), torch elsewhere. `onnx-int8` halves the time again and costs a little recall: see docs/retriever.md."""
    encoder_max_tokens: Positive = 256
    """Of a query or a passage with its prefix; a longer one is cut."""
    index_factory: str = "Flat"
    """A FAISS index_factory string; inner product."""
    index_search: str = ""
    """FAISS search parameters, such as `efSearch=128`, `nprobe=32` or `nprobe=32,k_factor_rf=8`. Changing them needs no rebuild."""
    index_mmap: bool = False
    """Map the index file instead of reading it into memory: opens at once, pages come as they are searched. Its digest is then
    not read again while size and time stamp are those of the manifest; `index check` reads it."""
    index_device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: a Flat index as float16 on all visible GPUs, a part on each. Needs a FAISS built for GPUs."""
    topk: Positive = 3
    """Passages per query when the request does not say."""
    max_topk: Positive = 100
    """Most passages that a request may ask for; beyond this, or one of the next two, it is answered 422."""
    max_queries: Positive = 512
    """Queries in one request."""
    max_query_chars: Positive = 4000
    """Characters of one query."""
    max_batch: Positive = 64
    """Queries encoded and searched together."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 4.0
    """How long the first query of a batch waits for company."""
    queue_size: Positive = 2048
    """Queries waiting at most; beyond it requests are answered 503 with Retry-After."""
    threads: Positive = 1
    """Texts encoded side by side while the service answers."""
    index_threads: NonNegative = 0
    """While the index is built; 0 takes every core this process may use."""
    index_workers: Positive = 1
    """Processes that encode while the index is built. They share `index_threads`; with encoder_device `cuda`, one a GPU."""
    index_checkpoint_s: Annotated[float, Field(ge=0)] = 10.0
    """A build that is killed loses at most so much encoding."""
    cache_size: NonNegative = 20_000
    """Answers kept, by (query, topk), of each index."""
    bm25: Bm25Config = Bm25Config()
    hybrid: HybridConfig = HybridConfig()
    rerank: RerankConfig = RerankConfig()
    web: WebConfig = WebConfig()

    @model_validator(mode="after")
    def _within_limits(self) -> RetrieverConfig:
        if len(set(self.backends)) < len(self.backends):
            raise ValueError("retriever.backends names one twice: name each once")
        if self.index_device == "cuda" and self.index_factory != "Flat":
            raise ValueError(
                f'retriever.index_device "cuda" is for retriever.index_factory "Flat", not {self.index_factory!r}: set one of them'
            )
        if self.encoder_runtime.startswith("onnx") and (self.encoder_device, self.encoder_dtype) != ("cpu", "float32"):
            raise ValueError(
                f'retriever.encoder_runtime "{self.encoder_runtime}" is for a CPU and float32: set encoder_device "cpu" and '
                'encoder_dtype "float32", or encoder_runtime "torch"'
            )
        if self.topk > self.max_topk:
            raise ValueError(
                f"retriever.topk {self.topk} is above retriever.max_topk {self.max_topk}: lower one or raise the other"
            )
        return self
