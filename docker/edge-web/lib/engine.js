/** An open artifact, whichever build of ONNX Runtime opened it. */

export class Engine {
  #ort;
  #session;

  /** @param {object} ort the module that opened `session`  @param {object} session  @param {object} artifact of the manifest */
  constructor(ort, session, artifact) {
    this.#ort = ort;
    this.#session = session;
    this.artifact = artifact;
    /** A fixed batch; images are repeated to fill it. */
    const [first] = artifact.inputs[0].shape;
    this.batch = typeof first === "number" ? first : 1;
  }

  /** Let go of the session's memory; there is no run after that. */
  async release() {
    await this.#session.release();
  }

  /**
   * One image.
   *
   * @param {{type: string, dims: number[], data: Float32Array | Uint8Array}} input dims `[1, ...]`
   * @returns {Promise<Record<string, {dims: number[], data: ArrayLike<number>}>>} outputs by name, dims `[1, ...]`
   */
  async run(input) {
    const { batch } = this;
    const data = new input.data.constructor(batch * input.data.length);
    for (let i = 0; i < batch; i++) data.set(input.data, i * input.data.length);
    const tensor = new this.#ort.Tensor(input.type, data, [batch, ...input.dims.slice(1)]);
    const outputs = await this.#session.run({ [this.artifact.inputs[0].name]: tensor });
    return Object.fromEntries(
      Object.entries(outputs).map(([name, { dims, data: values }]) => [
        name,
        { dims: [1, ...dims.slice(1)], data: values.subarray(0, values.length / batch) },
      ]),
    );
  }
}
