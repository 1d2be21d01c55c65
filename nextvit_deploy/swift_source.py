"""The Swift file of a self-test, in parts: what depends on the package stands between ``@``, or is a part of its own.

Plain Swift 5.7 for iOS 16 and macOS 13, on Core ML and Core Graphics alone: Vision resizes pictures by itself, which is
what the test must not do.
"""

from __future__ import annotations

import json
from typing import Final

_WHOLE: Final = """\
@HEADER@
//
// Asks the model about one known input on this device, and holds the answer against PyTorch's. README.md says how to
// add it to an app. iOS 16, macOS 13 or later.

import CoreGraphics
import CoreML
import CoreVideo
import CryptoKit
import Foundation
import ImageIO

public enum NextViTSelfTest {
    static let modelName = @MODEL@
    static let inputName = @INPUT@
    static let outputName = @OUTPUT@
@LABEL@
    /// What came of it: `print` it.
    public struct Verdict: CustomStringConvertible {
        public let passed: Bool
        public let lines: [String]
        public var description: String {
            ([passed ? "PASSED" : "FAILED"] + lines).joined(separator: "\\n  ")
        }
    }

    struct Failure: Error, CustomStringConvertible {
        let description: String
    }

    /// What expected.json holds of what is needed here.
    struct Expected: Decodable {
        struct Answer: Decodable {
            let index: Int
            let label: String
            let value: Double
        }
        struct Input: Decodable {
            let width: Int
            let height: Int
            let sha256: String
        }
        struct Tolerance: Decodable {
            let absolute: Double
        }
        let input: Input
        let top: [Answer]
        let decided: Bool
        let tolerance: Tolerance
    }

    /// The verdict on one choice of compute units; throws where the model can't be loaded or asked.
    public static func run(on units: MLComputeUnits = .all, in bundle: Bundle = .main) throws -> Verdict {
        let json = try Data(contentsOf: file("expected", "json", bundle))
        let expected = try JSONDecoder().decode(Expected.self, from: json)
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        let model = try MLModel(contentsOf: file(modelName, "mlmodelc", bundle), configuration: configuration)
        let golden = try goldenInput(expected.input, bundle)
        let inputs = try MLDictionaryFeatureProvider(dictionary: [inputName: golden])
        let answer = try model.prediction(from: inputs)
        var passed = true
        var lines: [String] = []
        for each in expected.top {
            let found = try number(of: each, in: answer)
            let good = abs(found - each.value) <= expected.tolerance.absolute
            passed = passed && good
            lines.append("\\(good ? "ok   " : "WRONG") \\(each.label): \\(found) here, \\(each.value) in PyTorch")
        }
        if let first = expected.top.first, expected.decided {
            let same = try isBest(first, in: answer)
            passed = passed && same
            lines.append(same ? "ok    the first is the same" : "WRONG another class is the first")
        }
        return Verdict(passed: passed, lines: lines)
    }

    /// The verdicts on every choice of compute units, by name.
    public static func runOnEachUnit(in bundle: Bundle = .main) throws -> [String: Verdict] {
        [
            "cpuOnly": try run(on: .cpuOnly, in: bundle),
            "cpuAndGPU": try run(on: .cpuAndGPU, in: bundle),
            "cpuAndNeuralEngine": try run(on: .cpuAndNeuralEngine, in: bundle),
            "all": try run(on: .all, in: bundle),
        ]
    }

    private static func file(_ name: String, _ suffix: String, _ bundle: Bundle) throws -> URL {
        guard let url = bundle.url(forResource: name, withExtension: suffix) else {
            throw Failure(description: "\\(name).\\(suffix) is not in the bundle; add it to the target")
        }
        return url
    }

    private static func check(_ bytes: Data, _ expected: Expected.Input) throws {
        let hash = SHA256.hash(data: bytes).map { String(format: "%02x", $0) }.joined()
        guard hash == expected.sha256 else {
            throw Failure(description: "the golden input is not what was exported; something changed its numbers")
        }
    }

@GOLDEN@
@ANSWER@}
"""
_PICTURE: Final = """\
    /// The golden picture, pixel by pixel: no resizing, no change of colours.
    private static func goldenInput(_ expected: Expected.Input, _ bundle: Bundle) throws -> MLFeatureValue {
        let url = try file("golden", "png", bundle)
        guard let source = CGImageSourceCreateWithURL(url as CFURL, nil),
            let picture = CGImageSourceCreateImageAtIndex(source, 0, nil)
        else {
            throw Failure(description: "golden.png can't be read")
        }
        guard picture.width == expected.width, picture.height == expected.height else {
            throw Failure(description: "golden.png is of another size than was exported")
        }
        let surface: [String: Any] = [kCVPixelBufferIOSurfacePropertiesKey as String: [String: Any]()]
        var made: CVPixelBuffer?
        CVPixelBufferCreate(
            kCFAllocatorDefault, picture.width, picture.height, kCVPixelFormatType_32BGRA,
            surface as CFDictionary, &made)
        guard let buffer = made else {
            throw Failure(description: "there is no memory for a picture")
        }
        try draw(picture, into: buffer)
        try check(colours(of: buffer), expected)
        return MLFeatureValue(pixelBuffer: buffer)
    }

    /// In the picture's own colour space, so that its numbers stay what they are.
    private static func draw(_ picture: CGImage, into buffer: CVPixelBuffer) throws {
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        let context = CGContext(
            data: CVPixelBufferGetBaseAddress(buffer), width: picture.width, height: picture.height,
            bitsPerComponent: 8, bytesPerRow: CVPixelBufferGetBytesPerRow(buffer),
            space: picture.colorSpace ?? CGColorSpaceCreateDeviceRGB(),
            bitmapInfo: CGImageAlphaInfo.noneSkipFirst.rawValue | CGBitmapInfo.byteOrder32Little.rawValue)
        guard let canvas = context else {
            throw Failure(description: "golden.png can't be drawn")
        }
        canvas.interpolationQuality = .none
        canvas.draw(picture, in: CGRect(x: 0, y: 0, width: picture.width, height: picture.height))
    }

    /// Red, green and blue of each pixel, row by row from the top.
    private static func colours(of buffer: CVPixelBuffer) throws -> Data {
        CVPixelBufferLockBaseAddress(buffer, .readOnly)
        defer { CVPixelBufferUnlockBaseAddress(buffer, .readOnly) }
        guard let base = CVPixelBufferGetBaseAddress(buffer) else {
            throw Failure(description: "the picture can't be read back")
        }
        var bytes = Data()
        for row in 0..<CVPixelBufferGetHeight(buffer) {
            let start = base + row * CVPixelBufferGetBytesPerRow(buffer)
            for column in 0..<CVPixelBufferGetWidth(buffer) {
                let pixel = (start + 4 * column).assumingMemoryBound(to: UInt8.self)
                bytes.append(contentsOf: [pixel[2], pixel[1], pixel[0]])
            }
        }
        return bytes
    }
"""
_TENSOR: Final = """\
    /// The golden tensor, float32 in the order of its axes (1, 3, height, width).
    private static func goldenInput(_ expected: Expected.Input, _ bundle: Bundle) throws -> MLFeatureValue {
        let bytes = try Data(contentsOf: file("golden", "bin", bundle))
        try check(bytes, expected)
        let shape = [1, 3, expected.height, expected.width].map { NSNumber(value: $0) }
        let array = try MLMultiArray(shape: shape, dataType: .float32)
        let numbers = bytes.withUnsafeBytes { Array($0.bindMemory(to: Float32.self)) }
        guard numbers.count == array.count else {
            throw Failure(description: "golden.bin is of another size than was exported")
        }
        for (index, number) in numbers.enumerated() {
            array[index] = NSNumber(value: number)
        }
        return MLFeatureValue(multiArray: array)
    }
"""
_CLASSIFY: Final = """\
    private static func number(of expected: Expected.Answer, in answer: MLFeatureProvider) throws -> Double {
        let probabilities = answer.featureValue(for: outputName)?.dictionaryValue
        guard let found = probabilities?[AnyHashable(expected.label)] else {
            throw Failure(description: "the model returns no probability for \\(expected.label)")
        }
        return found.doubleValue
    }

    private static func isBest(_ expected: Expected.Answer, in answer: MLFeatureProvider) throws -> Bool {
        guard let label = answer.featureValue(for: labelName)?.stringValue else {
            throw Failure(description: "the model returns no \\(labelName)")
        }
        return label == expected.label
    }
"""
_LOGITS: Final = """\
    private static func number(of expected: Expected.Answer, in answer: MLFeatureProvider) throws -> Double {
        let logits = try array(in: answer)
        guard expected.index < logits.count else {
            throw Failure(description: "the model returns \\(logits.count) classes, too few")
        }
        return logits[expected.index].doubleValue
    }

    private static func isBest(_ expected: Expected.Answer, in answer: MLFeatureProvider) throws -> Bool {
        let logits = try array(in: answer)
        let best = (0..<logits.count).max { logits[$0].doubleValue < logits[$1].doubleValue }
        return best == expected.index
    }

    private static func array(in answer: MLFeatureProvider) throws -> MLMultiArray {
        guard let logits = answer.featureValue(for: outputName)?.multiArrayValue else {
            throw Failure(description: "the model returns no \\(outputName)")
        }
        return logits
    }
"""


def swift_source(header: str, model: str, input_name: str, output: str, label: str | None, *, picture: bool) -> str:
    """The file's text: ``model`` is the package's name without suffix, ``label`` a classifier's label output.

    ``output`` holds the probabilities by label where there is a ``label``, logits otherwise.
    """
    parts = {
        "@HEADER@": header,
        "@MODEL@": _literal(model),
        "@INPUT@": _literal(input_name),
        "@OUTPUT@": _literal(output),
        "@LABEL@": "" if label is None else f"    static let labelName = {_literal(label)}\n",
        "@GOLDEN@": _PICTURE if picture else _TENSOR,
        "@ANSWER@": _LOGITS if label is None else _CLASSIFY,
    }
    text = _WHOLE
    for mark, part in parts.items():
        text = text.replace(mark, part)
    return text


def _literal(text: str) -> str:
    """A Swift string literal; names of files and features hold no control characters."""
    return json.dumps(text, ensure_ascii=False)
