"""EM/F1 of SQuAD v1.1 as an `evaluate` metric that needs no network.

evaluate.load(os.path.join(here, "squad_metric"), keep_in_memory=True), from a script whose folder holds utils_qa.py.
The numbers are those of utils_qa.squad_em_f1; nothing is computed here.
"""

# evaluate reads one imported module a line; utils_qa comes from the folder of the running script, on sys.path
import datasets
import evaluate

from utils_qa import squad_em_f1, squad_em_f1_per_example


class SquadMetric(evaluate.Metric):
    """compute(predictions=[{"id", "prediction_text"}], references=[{"id", "answers": {"text", "answer_start"}}]).

    With per_example=True: {"per_example": [(exact match, F1), ...]}, each 0 to 1, in the order of the references.
    """

    def _info(self):
        string = datasets.Value("string")
        answers = {"text": datasets.List(string), "answer_start": datasets.List(datasets.Value("int32"))}
        return evaluate.MetricInfo(
            description="Exact match and F1 in percent, as in the official SQuAD v1.1 evaluation.",
            citation="Rajpurkar et al. 2016, arXiv:1606.05250",
            inputs_description="Predictions with id and prediction_text, references with id and answers.",
            features=datasets.Features(
                {
                    "predictions": {"id": string, "prediction_text": string},
                    "references": {"id": string, "answers": answers},
                }
            ),
        )

    def _compute(self, predictions, references, per_example=False):
        texts = {row["id"]: row["prediction_text"] for row in predictions}
        golds = {row["id"]: row["answers"]["text"] for row in references}
        if per_example:
            return {"per_example": list(squad_em_f1_per_example(texts, golds).values())}
        return squad_em_f1(texts, golds)
