"""What `langmill data prepare` and its companions can be told; see settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from langmill.common.setting import Count, Settings


class InputSettings(Settings):
    """How sources are found and read."""

    text_field: str = Field(
        "text", min_length=1, description="the field or column that holds a row's text; a.b reaches inside"
    )
    fields: list[str] = Field(
        default_factory=list,
        description="where rows of chats and posts hold the rest, as NAME=FIELD (repeatable): id, thread, parent, "
        "author, time; with thread or parent, the rows of a thread become one document, in order",
    )
    meta: list[str] = Field(
        default=[
            "id",
            "url",
            "date",
            "timestamp",
            "title",
            "licence",
            "license",
            "lang",
            "language",
            "thread",
            "robots",
        ],
        description="fields of a row that are kept beside its text (repeatable)",
    )
    section_bytes: Count = Field(
        1 << 20, ge=256, description="plain text longer than this is cut at blank lines into documents"
    )
    unit_bytes: Count = Field(
        8 << 20,
        ge=1024,
        description="bytes of input in one unit of work, about; a unit is what a rerun finds done",
    )
    unit_files: int = Field(2000, ge=1, description="files in one unit of work, at most")
    seconds: float = Field(
        20.0, gt=0, description="processor time that one page, PDF or mail may take to read"
    )
    memory: Count = Field(
        2 << 30, ge=256 << 20, description="memory that reading one page, PDF or mail may take"
    )
    expansion: int = Field(
        200,
        ge=2,
        description="a compressed file that grows more than so many times, beyond 1 GiB, is a bomb and "
        "set aside",
    )
    follow_links: bool = Field(False, description="read links that lead out of their source too")


class TidySettings(Settings):
    """What is put right in every text."""

    mojibake: bool = Field(True, description="repair text that was decoded wrongly, such as cafÃ© (ftfy)")
    normalize: bool = Field(True, description="Unicode normal form C")
    controls: bool = Field(
        True, description="line ends become \\n; control characters, byte-order marks and soft hyphens go"
    )


class LanguageSettings(Settings):
    """Which languages are kept."""

    detect: bool = Field(True, description="say each document's language in its meta (extra: data)")
    keep: list[str] = Field(
        default_factory=list,
        description="keep these languages alone, such as en de zh (repeatable); none: all",
    )
    min_score: float = Field(
        0.65, ge=0, le=1, description="with keep: how sure of its language a document must be (FineWeb: 0.65)"
    )


class RuleSettings(Settings):
    """Which documents are good enough."""

    preset: Literal["none", "repetition", "web"] = Field(
        "none",
        description="none: keep all; repetition: leave out texts that say the same again and again (Gopher); web: also "
        "what is no running prose (Gopher, C4, FineWeb; Chinese and Japanese by characters), lines joined first",
    )
    thresholds: list[str] = Field(
        default_factory=list,
        description="other thresholds than the published ones, as STEP.FIELD=VALUE such as "
        "gopher_quality.min_words=20; null switches a rule off (repeatable)",
    )
    decontaminate: list[str] = Field(
        default_factory=list,
        description="files of evaluation rows: leave out documents that hold 13 words of one in a row (repeatable)",
    )
    words: list[str] = Field(
        default_factory=list,
        description="word lists as NAME=FILE, a word or phrase a line: meta says how many of each a text holds "
        "(repeatable)",
    )
    words_at_most: list[str] = Field(
        default_factory=list,
        description="leave out texts with more words of a list in a thousand, as NAME=NUMBER: rude=5 (repeatable)",
    )


class QualitySettings(Settings):
    """A classifier that says which documents are good: made by `langmill finetune MODEL --task classify`."""

    model: str | None = Field(None, description="its folder; meta says the score of each document; none: off")
    label: str = Field("good", description="the label of documents that are wanted")
    at_least: float = Field(0.5, description="leave out documents of which its score is lower")


class CleanseSettings(Settings):
    """What becomes of personal details and secrets."""

    policy: Literal["none", "mask", "label", "pseudonym", "remove"] = Field(
        "mask",
        description="of e-mail addresses, telephone and card numbers, keys …: mask ****, label [EMAIL], the same "
        "pseudonym each time (needs a key), remove; none: leave them",
    )
    types: list[str] = Field(default_factory=list, description="types to look for (repeatable); none: all")
    key_file: Path | None = Field(None, description="pseudonym: the file that holds the key")
    key_env: str | None = Field(None, description="pseudonym: the environment variable that holds the key")
    make_key: bool = Field(False, description="write a new key to key_file where there is none")
    names: str | None = Field(
        None,
        description="find persons and addresses too: a folder made by finetune --task tag, or presidio:PIPELINE",
    )


class DuplicateSettings(Settings):
    """Which copies are left out, over all sources."""

    exact: bool = Field(True, description="leave out texts that are equal but for case and spaces")
    near: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="leave out texts whose word 5-grams are so much alike (Jaccard); none: keep them",
    )
    keep: Literal["longest", "first"] = Field(
        "longest", description="the copy that stays: the longest, or by its id"
    )
    n: int = Field(5, ge=1, description="words in a gram")
    bands: int = Field(
        16, ge=1, description="keys by which candidates are found: more find more, and take longer"
    )
    rows: int = Field(6, ge=1, description="hashes in one key")


class BoilerplateSettings(Settings):
    """Which lines are cut because a whole site has them, once copies are out."""

    cut: bool = Field(
        False,
        description="cut lines that many documents of one site share; a site is the host of meta's url, else the "
        "folder of the file",
    )
    share: float = Field(0.1, gt=0, le=1, description="share of a site's documents that hold the line")
    documents: int = Field(10, ge=2, description="and so many documents of it at least")
    bytes: int = Field(12, ge=1, description="shorter lines stay, such as } in code")


class MixtureSettings(Settings):
    """How much of each source there is in the clean set."""

    weights: list[str] = Field(
        default_factory=list,
        description="shares of the sources in the bytes of the clean set, as SOURCE=WEIGHT for each (repeatable); "
        "none: each document once",
    )
    most: float = Field(
        4.0,
        ge=1,
        description="times that a source is there at most: beyond four, repeating teaches little "
        "(Muennighoff et al. 2023)",
    )


class PrepareSettings(Settings):
    """`langmill data prepare`: raw files to clean documents, each one accounted for."""

    source: list[str] = Field(
        min_length=1,
        description="files, folders and patterns such as 'raw/*.jsonl': .txt .md .html .warc .pdf .jsonl .json .csv "
        ".tsv .parquet .mbox .eml, most of them .gz or .zst too; or a data set of the hub as "
        "hf://datasets/OWNER/NAME[@REVISION][/PATH]",
    )
    out: Path = Field(description="folder to write; its private run folder is OUT.run")
    workers: int | None = Field(
        None, ge=1, description="processes; none: one for each core, of all machines of a cluster"
    )
    engine: Literal["native", "ray"] = Field(
        "native",
        description="native: processes of this machine; ray: a Ray cluster whose machines share the disk (extra: "
        "cluster)",
    )
    address: str | None = Field(
        None, description="ray: the cluster's address, such as 10.0.0.1:6379; none: one on this machine"
    )
    part_bytes: Count = Field(
        256 << 20, ge=1024, description="bytes of text in one file of the clean set, about"
    )
    resume: bool = Field(
        False,
        description="go on in an OUT that was made from other sources or settings; what still fits is reused",
    )
    force: bool = Field(False, description="do all work anew, and replace an existing --out")
    read: InputSettings = InputSettings()
    tidy: TidySettings = TidySettings()
    language: LanguageSettings = LanguageSettings()
    rules: RuleSettings = RuleSettings()
    quality: QualitySettings = QualitySettings()
    redact: CleanseSettings = CleanseSettings()
    duplicates: DuplicateSettings = DuplicateSettings()
    boilerplate: BoilerplateSettings = BoilerplateSettings()
    mixture: MixtureSettings = MixtureSettings()


class PreparedSettings(Settings):
    """`langmill data report`: what a prepared folder holds, as a page and a datasheet."""

    folder: Path = Field(description="the folder that `langmill data prepare` wrote")


class WhySettings(Settings):
    """`langmill data why`: what became of a document."""

    folder: Path = Field(description="the folder that `langmill data prepare` wrote")
    id: str = Field(
        description="the document, such as pages/a.html or rows.jsonl#12, or an id that its row had"
    )


class ForgetSettings(Settings):
    """`langmill data forget`: documents leave a prepared folder for good."""

    folder: Path = Field(description="the folder that `langmill data prepare` wrote")
    id: list[str] = Field(default_factory=list, description="documents to remove (repeatable)")
    match: list[str] = Field(
        default_factory=list,
        description="remove every document whose text holds this, as written (repeatable)",
    )
    models: list[Path] = Field(
        default_factory=list,
        description="folders to search for shards that hold them and models that were trained on them (repeatable); "
        "none: the one FOLDER is in",
    )
