import numpy as np

OPTIONS = []


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def variants(seed):
    return [inputs(seed, (3, 2, 4)), inputs(seed, (2, 3, 2, 4))]


def reference(student_logits, teacher_logits):
    values = []
    for student, teacher in zip(student_logits, teacher_logits):
        squares = [(s - t) ** 2 for s, t in zip(student.reshape(-1), teacher.reshape(-1))]
        values.append(sum(squares) / len(squares))
    return np.array(values)


def closed_forms():
    return [({"student_logits": np.array([[1.0, 3.0]]), "teacher_logits": np.array([[0.0, 1.0]])}, {}, [2.5])]
