import Foundation

/// A decoder language model made by `bitcompile build --target ios`.
///
/// The work is done by `bitcompile_model.c`: weights stay in the mapped file, and the KV cache is
/// one buffer a tensor that attention appends to in place. One call at a time; all of them run on
/// a queue of the model's own, never on the main thread.
public final class BitcompileModel: @unchecked Sendable {
    /// ONNX Runtime's or the plugin's reason.
    public struct Failure: LocalizedError {
        public let errorDescription: String?
    }

    private let queue = DispatchQueue(label: "bitcompile", qos: .userInitiated)
    private var model: OpaquePointer?

    /// Opens the artifact in `folder`.
    ///
    /// - Parameters:
    ///   - capacity: most tokens the KV cache holds, prompt and answer of all turns.
    ///   - threads: size of the thread pool; the performance cores by default.
    public init(folder: URL, capacity: Int, threads: Int = performanceCores()) throws {
        let failure = folder.path.withCString { path -> UnsafePointer<CChar>? in
            var options = bcm_options()
            options.folder = path
            options.capacity = capacity
            options.threads = Int32(threads)
            options.spinning = 0
            return bcm_open(&options, &model)
        }
        try Self.check(failure)
    }

    deinit {
        bcm_close(model)
    }

    /// Bytes of the KV cache; they count to the app's memory, the weights do not.
    public var cacheBytes: Int {
        bcm_cache_bytes(model)
    }

    /// Forgets every token but the first `length`.
    public func rewind(to length: Int = 0) {
        queue.sync { bcm_rewind(model, length) }
    }

    /// Reads `prompt`, then gives greedy tokens as they come, until one of `ends`, `most` tokens,
    /// or a consumer that stops listening. The last token is not in the cache yet: begin the next
    /// turn's tokens with it.
    public func generate(
        _ prompt: [Int64], most: Int, ends: Set<Int64> = []
    ) -> AsyncThrowingStream<Int64, Error> {
        AsyncThrowingStream { continuation in
            let stopped = Flag()
            continuation.onTermination = { _ in stopped.set() }
            queue.async {
                do {
                    var feed = prompt
                    for _ in 0..<most where !stopped.isSet {
                        let token = try self.next(feed)
                        continuation.yield(token)
                        if ends.contains(token) { break }
                        feed = [token]
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
        }
    }

    private func next(_ tokens: [Int64]) throws -> Int64 {
        var logits: UnsafePointer<Float>?
        try Self.check(bcm_feed(model, tokens, tokens.count, &logits))
        return bcm_argmax(logits, bcm_vocabulary(model))
    }

    private static func check(_ failure: UnsafePointer<CChar>?) throws {
        if let failure {
            throw Failure(errorDescription: String(cString: failure))
        }
    }
}

/// How many performance cores the device has: an operator waits for its slowest thread.
public func performanceCores() -> Int {
    var count: Int32 = 0
    var size = MemoryLayout<Int32>.size
    if sysctlbyname("hw.perflevel0.physicalcpu", &count, &size, nil, 0) == 0, count > 0 {
        return Int(count)
    }
    return max(1, ProcessInfo.processInfo.activeProcessorCount / 2)
}

private final class Flag: @unchecked Sendable {
    private let lock = NSLock()
    private var value = false

    var isSet: Bool {
        lock.lock()
        defer { lock.unlock() }
        return value
    }

    func set() {
        lock.lock()
        defer { lock.unlock() }
        value = true
    }
}
