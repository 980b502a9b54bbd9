"""What a model is asked: texts, needles, RULER, recall, questions, and how one case is scored."""
