"""usagi.nlp.v1.NlpService: protobuf in, protobuf out; no ONNX Runtime."""

from __future__ import annotations

from typing import Any

import grpc.aio
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.serving.predictors import Source, TranslateAnswer, TranslateQuery, Translation, Translator
from services.nlp.tokenizers.special import EOS, SPECIAL_PIECES
from shared.serving.calls import deadline_of

Context = grpc.aio.ServicerContext[Any, Any]


class NlpServicer(pb_grpc.NlpServiceServicer):
    """Answers questions about text."""

    def __init__(self, translator: Translator) -> None:
        self._translator = translator

    async def Translate(self, request: pb.TranslateRequest, context: Context) -> pb.TranslateResponse:
        """Translates one sentence."""
        query = TranslateQuery(
            text=request.text,
            model=request.model,
            version=request.version,
            variant=request.variant,
            beam=request.beam if request.HasField("beam") else None,
            n_best=request.n_best if request.HasField("n_best") else None,
            max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
            length_penalty=request.length_penalty if request.HasField("length_penalty") else None,
            attention=request.attention,
            deadline=deadline_of(context),
        )
        return _translate_response(await self._translator.translate(query))


def _translate_response(answer: TranslateAnswer) -> pb.TranslateResponse:
    return pb.TranslateResponse(
        hypotheses=[_hypothesis(translation, answer.source) for translation in answer.translations],
        source_words=answer.source.words,
        unknown_words=answer.source.unknown_words,
        steps=answer.steps,
        info=model_pb.InferenceInfo(
            model=answer.model,
            version=answer.version,
            variant=answer.variant,
            batch_size=answer.batch_size,
            queue_seconds=answer.queue_seconds,
            preprocess_seconds=answer.preprocess_seconds,
            infer_seconds=answer.infer_seconds,
            postprocess_seconds=answer.postprocess_seconds,
        ),
    )


def _hypothesis(translation: Translation, source: Source) -> pb.Hypothesis:
    hypothesis = pb.Hypothesis(
        text=translation.text,
        words=translation.words,
        tokens=translation.tokens,
        score=translation.score,
        log_probability=translation.log_probability,
        finished=translation.finished,
    )
    if translation.attention is not None:
        rows, columns = translation.attention.shape
        end = [SPECIAL_PIECES[EOS]] if translation.finished else []
        hypothesis.attention.CopyFrom(
            pb.AttentionMatrix(
                rows=rows,
                columns=columns,
                weights=translation.attention.ravel(),
                source_tokens=source.tokens,
                target_tokens=[*translation.tokens, *end],
            )
        )
    return hypothesis
