"""usagi.nlp.v1.NlpService: protobuf in, protobuf out; no ONNX Runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.serving.encoding import Encoded, ModelChoice, TextEncoder
from services.nlp.serving.generator import (
    GeneratedToken,
    GenerateQuery,
    GenerationSummary,
    ScoreAnswer,
    Scored,
    TextGenerator,
)
from services.nlp.serving.predictors import Source, TranslateAnswer, TranslateQuery, Translation, Translator
from services.nlp.tokenizers.special import EOS, SPECIAL_PIECES
from shared.serving.calls import deadline_of

Context = grpc.aio.ServicerContext[Any, Any]


class NlpServicer(pb_grpc.NlpServiceServicer):
    """Answers questions about text."""

    def __init__(self, translator: Translator, generator: TextGenerator, encoder: TextEncoder) -> None:
        self._translator, self._generator, self._encoder = translator, generator, encoder

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

    async def GenerateText(
        self, request: pb.GenerateTextRequest, context: Context
    ) -> AsyncIterator[pb.GenerateTextResponse]:
        """Continues a prompt, token by token."""
        query = GenerateQuery(
            prompt=request.prompt,
            model=request.model,
            version=request.version,
            variant=request.variant,
            max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
            temperature=request.temperature if request.HasField("temperature") else None,
            top_k=request.top_k if request.HasField("top_k") else None,
            top_p=request.top_p if request.HasField("top_p") else None,
            seed=request.seed if request.HasField("seed") else None,
            stop=tuple(request.stop),
            alternatives=request.alternatives,
            deadline=deadline_of(context),
        )
        async with aclosing(self._generator.generate(query)) as items:
            async for item in items:
                yield _token(item) if isinstance(item, GeneratedToken) else _ending(item)

    async def ScoreText(self, request: pb.ScoreTextRequest, context: Context) -> pb.ScoreTextResponse:
        """Says how probable a text is."""
        answer = await self._generator.score(
            request.text, request.model, request.version, request.variant, deadline_of(context)
        )
        return pb.ScoreTextResponse(
            tokens=map(_scored, answer.tokens),
            log_probability=answer.log_probability,
            perplexity=answer.perplexity,
            info=_info(answer),
        )

    async def FillMask(self, request: pb.FillMaskRequest, context: Context) -> pb.FillMaskResponse:
        """Says what may stand in the gaps of a text."""
        top_k = request.top_k if request.HasField("top_k") else None
        answer = await self._encoder.fill(request.text, top_k, _choice(request, context))
        return pb.FillMaskResponse(
            gaps=[
                pb.Gap(candidates=[pb.Candidate(piece=one.piece, probability=one.probability) for one in gap])
                for gap in answer.value.gaps
            ],
            text=answer.value.text,
            pieces=answer.row.pieces,
            unknown_words=answer.row.unknown_words,
            info=_info(answer),
        )

    async def EmbedText(self, request: pb.EmbedTextRequest, context: Context) -> pb.EmbedTextResponse:
        """Turns a text into a vector."""
        answer = await self._encoder.embed(request.text, _choice(request, context))
        return pb.EmbedTextResponse(
            embedding=answer.value,
            pieces=len(answer.row.ids),
            unknown_words=answer.row.unknown_words,
            info=_info(answer),
        )

    async def ClassifyText(self, request: pb.ClassifyTextRequest, context: Context) -> pb.ClassifyTextResponse:
        """Says what kind of text a text is."""
        top_k = request.top_k if request.HasField("top_k") else None
        answer = await self._encoder.classify(request.text, top_k, _choice(request, context))
        return pb.ClassifyTextResponse(
            classes=[pb.TextClass(label=label, probability=probability) for label, probability in answer.value],
            unknown_words=answer.row.unknown_words,
            info=_info(answer),
        )

    async def NextSentence(self, request: pb.NextSentenceRequest, context: Context) -> pb.NextSentenceResponse:
        """Says whether one text follows another."""
        answer = await self._encoder.follows(request.first, request.second, _choice(request, context))
        return pb.NextSentenceResponse(
            probability=answer.value, unknown_words=answer.row.unknown_words, info=_info(answer)
        )


def _choice(
    request: pb.FillMaskRequest | pb.EmbedTextRequest | pb.ClassifyTextRequest | pb.NextSentenceRequest,
    context: Context,
) -> ModelChoice:
    return ModelChoice(request.model, request.version, request.variant, deadline_of(context))


def _scored(token: Scored) -> pb.ScoredToken:
    return pb.ScoredToken(text=token.text, log_probability=token.log_probability)


def _token(item: GeneratedToken) -> pb.GenerateTextResponse:
    return pb.GenerateTextResponse(
        text=item.text, token=_scored(item.token), alternatives=map(_scored, item.alternatives)
    )


def _ending(summary: GenerationSummary) -> pb.GenerateTextResponse:
    reasons = {"length": pb.FINISH_REASON_LENGTH, "stop": pb.FINISH_REASON_STOP}
    return pb.GenerateTextResponse(
        text=summary.tail,
        finish_reason=reasons[summary.finish],
        tokens=summary.tokens,
        seed=summary.seed,
        info=_info(summary),
    )


def _info(answer: TranslateAnswer | GenerationSummary | ScoreAnswer | Encoded[Any]) -> model_pb.InferenceInfo:
    return model_pb.InferenceInfo(
        model=answer.model,
        version=answer.version,
        variant=answer.variant,
        batch_size=answer.batch_size,
        queue_seconds=answer.queue_seconds,
        preprocess_seconds=answer.preprocess_seconds,
        infer_seconds=answer.infer_seconds,
        postprocess_seconds=answer.postprocess_seconds,
    )


def _translate_response(answer: TranslateAnswer) -> pb.TranslateResponse:
    return pb.TranslateResponse(
        hypotheses=[_hypothesis(translation, answer.source) for translation in answer.translations],
        source_words=answer.source.words,
        unknown_words=answer.source.unknown_words,
        steps=answer.steps,
        info=_info(answer),
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
