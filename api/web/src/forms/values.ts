// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Between the fields of a form and the parameters of a call. Pure.
//
// A field's name is a parameter (`cores`), a key of a property string (`net0.bridge`), or a part of a volume that is
// to be allocated (`rootfs:storage`, `rootfs:size`, size in GiB).
import { check, paramAt, type Param, type Params } from '../api/schema';
import { print, type Properties } from '../lib/propertyString';

export type Values = Record<string, string>;

const ALLOCATION: Record<string, Param> = {
  storage: { type: 'string', description: 'Where the volume is made.' },
  size: { type: 'number', minimum: 0.001, maximum: 131_072, description: 'Size in GiB.' },
};

/** The parameter that a field's value must fit; undefined when the API does not know the field. */
export function fieldParam(params: Params, name: string): Param | undefined {
  const [key, part] = name.split(':', 2) as [string, string?];
  if (part) return paramAt(params, key) && ALLOCATION[part];
  const param = paramAt(params, name);
  // A property string shown as one field is its bare key.
  if (typeof param?.format === 'object' && param.default_key) {
    const bare = param.format[param.default_key];
    return bare && { ...bare, ...(param.description ? { description: param.description } : {}), optional: param.optional ?? bare.optional ?? 0 };
  }
  return param;
}

/** The parameter a field contributes to: `net0.bridge` to net0. */
export function parameterOf(name: string): string {
  return name.split(/[.:]/, 1)[0] ?? name;
}

/** What is wrong with each field, by field name. */
export function checkFields(params: Params, names: string[], values: Values, needed: ReadonlySet<string> = new Set()): Record<string, string> {
  const errors: Record<string, string> = {};
  for (const name of names) {
    const param = fieldParam(params, name);
    if (!param) continue;
    const value = values[name] ?? '';
    // A part of a property string is needed only when the property string is there at all.
    const part = name.includes('.') && !needed.has(name);
    const optional = needed.has(name) ? 0 : part ? 1 : param.optional;
    const error = check({ ...param, optional: optional ?? 0 }, value);
    if (error) errors[name] = error;
  }
  return errors;
}

/** The parameters of the call. Empty fields are left out. */
export function toParameters(params: Params, values: Values): Record<string, string> {
  const parameters: Record<string, string> = {};
  const properties = new Map<string, Properties>();
  const propertiesOf = (key: string): Properties => {
    const known = properties.get(key);
    if (known) return known;
    const made: Properties = {};
    properties.set(key, made);
    return made;
  };
  for (const [name, value] of Object.entries(values)) {
    if (value === '') continue;
    const key = parameterOf(name);
    if (name.includes('.')) propertiesOf(key)[name.slice(key.length + 1)] = value;
    else if (name.endsWith(':storage')) propertiesOf(key)[bareKey(params, key)] = `${value}:${values[`${key}:size`] ?? ''}`;
    else if (!name.includes(':')) parameters[name] = value;
  }
  for (const [key, parts] of properties) {
    const text = print(parts, paramAt(params, key)?.default_key ?? bareKey(params, key));
    if (text) parameters[key] = text;
  }
  return parameters;
}

function bareKey(params: Params, key: string): string {
  return paramAt(params, key)?.default_key ?? 'file';
}

/** Puts the server's errors at the fields they are about; what fits no field is returned under its own name. */
export function placeErrors(errors: Record<string, string>, fields: string[]): Record<string, string> {
  const placed: Record<string, string> = {};
  for (const [name, text] of Object.entries(errors)) {
    const field = fields.find((candidate) => candidate === name) ?? fields.find((candidate) => parameterOf(candidate) === name || parameterOf(candidate) === parameterOf(name));
    placed[field ?? name] = text;
  }
  return placed;
}
