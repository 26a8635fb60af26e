import SwiftUI

/// One screen: token ids in, token ids out as they come. Put a tokenizer between, see README.md.
struct ContentView: View {
    @State private var prompt = "0 529 1081 735 3806 263 788"
    @State private var answer = ""
    @State private var task: Task<Void, Never>?
    @State private var model: BitcompileModel?

    var body: some View {
        VStack(alignment: .leading, spacing: 12) {
            TextField("Token ids", text: $prompt)
                .textFieldStyle(.roundedBorder)
            Button(task == nil ? "Generate" : "Stop") {
                if let task {
                    task.cancel()
                } else {
                    task = Task { await generate() }
                }
            }
            ScrollView {
                Text(answer).textSelection(.enabled)
            }
        }
        .padding()
    }

    private func generate() async {
        answer = ""
        do {
            let model = try await opened()
            model.rewind()
            let tokens = prompt.split(separator: " ").compactMap { Int64($0) }
            for try await token in model.generate(tokens, most: 200) {
                answer += "\(token) "
            }
        } catch {
            answer += "\n\(error.localizedDescription)"
        }
        task = nil
    }

    /// The artifact lies in the app's bundle as a folder called "bitcompile": plain files, which
    /// can be mapped where they are.
    private func opened() async throws -> BitcompileModel {
        if let model { return model }
        guard let folder = Bundle.main.url(forResource: "bitcompile", withExtension: nil) else {
            throw BitcompileModel.Failure(
                errorDescription: "the app has no folder bitcompile: see README.md")
        }
        let opened = try await Task.detached {
            try BitcompileModel(folder: folder, capacity: 512)
        }.value
        model = opened
        return opened
    }
}
