import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from evit_training.measuring.metrics import ClassificationCounts, MultiLabelCounts


@pytest.fixture(scope="module")
def predictions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(203, 8, generator=generator)
    labels = torch.randint(0, 7, (203,), generator=generator)  # class 7 never occurs
    return logits, labels


def counted(counts, logits, labels, batch_size=17):
    for i in range(0, len(labels), batch_size):
        counts.add(logits[i : i + batch_size], labels[i : i + batch_size])
    return counts


def test_classification_metrics_are_those_of_scikit_learn(predictions):
    logits, labels = predictions
    found = counted(ClassificationCounts(8), logits, labels).summarize()
    guesses = logits.argmax(dim=1).numpy()
    there = list(range(7))
    assert found["top1"] == sk.accuracy_score(labels, guesses)
    assert found["top5"] == sk.top_k_accuracy_score(labels, logits.numpy(), k=5, labels=range(8))
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean(sk.recall_score(labels, guesses, labels=there, average=None))
    )
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, guesses, labels=there, average="macro"))
    assert found["confusion_matrix"] == sk.confusion_matrix(labels, guesses, labels=range(8)).tolist()
    columns = sk.precision_recall_fscore_support(labels, guesses, labels=range(8), zero_division=0.0)
    for name, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [row[name] for row in found["by_class"]] == pytest.approx(list(column))
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert found["num_images"] == 203


def test_images_that_fill_up_do_not_count(predictions):
    logits, labels = predictions
    plain = counted(ClassificationCounts(8), logits, labels).summarize()
    filled = ClassificationCounts(8)
    is_counted = torch.tensor([True] * 203 + [False] * 9)
    filled.add(torch.cat([logits, logits[:9]]), torch.cat([labels, labels[:9]]), is_counted)
    assert filled.summarize()["confusion_matrix"] == plain["confusion_matrix"]
    assert filled.summarize()["num_images"] == 203


def test_few_classes_have_a_top_five_of_all():
    counts = ClassificationCounts(3)
    counts.add(torch.eye(3), torch.tensor([2, 2, 2]))
    assert counts.summarize()["top5"] == 1.0


def test_many_classes_have_no_confusion_matrix():
    counts = ClassificationCounts(2001)
    counts.add(torch.randn(2, 2001), torch.tensor([0, 2000]))
    assert counts.summarize()["confusion_matrix"] is None


def test_multi_label_metrics_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(101, 5, generator=generator)
    labels = (torch.rand(101, 5, generator=generator) > 0.6).float()
    found = counted(MultiLabelCounts(5), logits, labels).summarize()
    guesses = (logits > 0).int().numpy()
    assert found["micro_f1"] == pytest.approx(sk.f1_score(labels, guesses, average="micro"))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, guesses, average="macro"))
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(labels, guesses))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).item()
    assert found["loss"] == pytest.approx(expected)


def test_nothing_evaluated_is_an_error():
    for counts in (ClassificationCounts(3), MultiLabelCounts(3)):
        with pytest.raises(ValueError, match="No image was evaluated"):
            counts.summarize()


def test_metrics_of_the_evaluate_library_work_offline(predictions):
    from evit_training.measuring.evaluate_metrics import ClassReport, TopKAccuracy

    logits, labels = predictions
    import evaluate

    for k in (1, 5):
        metric = TopKAccuracy(k=k)
        for i in range(0, 203, 50):
            metric.add_batch(predictions=logits[i : i + 50], references=labels[i : i + 50])
        expected = sk.top_k_accuracy_score(labels, logits.numpy(), k=k, labels=range(8))
        assert metric.compute() == {f"top{k}_accuracy": pytest.approx(expected)}
    report = ClassReport().compute(predictions=logits, references=labels)
    assert report["confusion_matrix"] == sk.confusion_matrix(labels, logits.argmax(1), labels=range(8)).tolist()
    both = evaluate.combine([TopKAccuracy(k=1), TopKAccuracy(k=5)])
    assert set(both.compute(predictions=logits, references=labels)) == {"top1_accuracy", "top5_accuracy"}
    with pytest.raises(ValueError, match="`k` is 9, but there are 8 classes"):
        TopKAccuracy(k=9).compute(predictions=logits, references=labels)
